"""SMPConv (Kim and Park 2023): kernels interpolated between self-moving points.

A kernel is a function over [-1, 1] per dimension. A point's influence falls linearly, in the L1 distance, from its
weight at its coordinates to 0 at its radius. Points move freely in training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from .core.arguments import Int, as_int
from .core.finite import require_finite
from .core.kernel import Kernel
from .core.kernel_conv import KernelConv1d, KernelConv2d
from .core.least_squares import Geometry, fit_separately, pixels_by_energy
from .core.plain import PlainConv, centred, margin
from .core.spec import KernelSize, KernelSpec

__all__ = [
    "SmpConv1d",
    "SmpConv2d",
    "SmpKernel",
    "SmpSpec",
    "point_basis",
    "small_kernel_sizes",
    "smp_kernel",
    "smp_sum_kernel",
]

Points = Literal["filter", "layer"]

SMALLEST_RADIUS = 1e-4  # lower end of the clipping in the released CIFAR and sequence code
LARGEST_RADIUS = 1.0  # upper end, in all released code
INITIAL_WEIGHT_STD = 0.02  # released ImageNet code
LARGEST_COUNT = 16384  # a quarter of the pixels of the largest kernel that a specification may ask for
# of the distance between pixels: a point this far off the middle of its pixel has a gradient, and with this radius it
# reaches no other pixel
OFF_CENTRE, ALONE = 0.05, 0.9
SEQUENCE_COUNT = 30  # points per kernel of a sequence (section 4.2)


def point_basis(coordinate: Tensor, radius: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Influence of every point on every pixel: max(0, g) of Kim and Park 2023, Eq. 2.

    Args:
        coordinate: (P, m, D) points; -1 and 1 are the centres of the first and the last pixel of a dimension.
        radius: (P, m), in the same unit; below 1e-4 it counts as 1e-4, so that nothing is divided by zero.
        kernel_size: D ints; a dimension of 1 has its pixel at 0.

    Returns:
        (P, m, prod(kernel_size)), from 0 to 1.
    """
    scale = 1 / radius.clamp(min=SMALLEST_RADIUS).unsqueeze(-1)
    first, *others = [
        (_pixels(size, coordinate) - coordinate[..., d].unsqueeze(-1)).abs() * scale
        for d, size in enumerate(kernel_size)
    ]
    height = 1 - first
    for distance in others:
        height = (height.unsqueeze(-1) - distance.unsqueeze(-2)).flatten(-2)
    return height.relu()


def smp_kernel(weight: Tensor, coordinate: Tensor, radius: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense SMP kernel: the mean over the neighbours of each pixel (Kim and Park 2023, Eq. 1 and 2).

    Args:
        weight: (C_out, C_in/groups, m) point weights.
        coordinate: (P, m, D) points; P is C_out (points per filter) or 1 (one set for the layer).
        radius: (P, m).
        kernel_size: D ints.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel; 0 where no point reaches.
    """
    basis = point_basis(coordinate, radius, kernel_size)
    neighbours = (basis > 0).sum(1, keepdim=True).clamp(min=1)
    kernel = _weighted_sum(weight, basis) / neighbours
    return kernel.reshape(weight.shape[:-1] + tuple(kernel_size))


def smp_sum_kernel(weight: Tensor, coordinate: Tensor, radius: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense SMP kernel without the division of Eq. 1, as in the released ImageNet models.

    Takes and returns what `smp_kernel` does.
    """
    kernel = _weighted_sum(weight, point_basis(coordinate, radius, kernel_size))
    return kernel.reshape(weight.shape[:-1] + tuple(kernel_size))


def _weighted_sum(weight: Tensor, basis: Tensor) -> Tensor:
    """One matrix product per set of points: (C_out, C_in/groups, m) and (P, m, K) to (P, -1, K)."""
    return torch.bmm(weight.reshape(basis.shape[0], -1, weight.shape[-1]), basis)


def fit_points(
    targets: Tensor, kernel_size: Sequence[int], count: int, normalize: bool, radii: tuple[float, float]
) -> tuple[dict[str, Tensor], Tensor]:
    """Points common to n kernels, and weights for each, that come near the kernels in least squares.

    Points start on the pixels that matter most. Where there are enough for all pixels that are not 0, each reaches
    its own alone, which is exact.

    Args:
        targets: (P, n, *size); each of the P problems has points of its own.
        kernel_size: D ints, at least the targets' size; the targets lie at its centre.
        count: m points.
        normalize: as in the layer.
        radii: smallest and largest radius.

    Returns:
        {"coordinate": (P, m, D), "radius": (P, m)} and weights (P, m, n), all float64 on the CPU.
    """
    targets = targets.detach().double().cpu()
    size = targets.shape[2:]
    margins = targets.new_tensor([margin(old, new) for old, new in zip(size, kernel_size, strict=True)])
    last = targets.new_tensor([max(k - 1, 1) for k in kernel_size])
    pixels = pixels_by_energy(targets, len(size), count) + margins
    spacing = 2 / last.max().item()
    used = int((targets != 0).any(1).flatten(1).sum(1).max())
    radius = (ALONE if count >= used else 1.5) * spacing
    start = {
        "coordinate": (2 * pixels - targets.new_tensor(kernel_size) + 1) / last + OFF_CENTRE * spacing,
        "radius": targets.new_full(pixels.shape[:2], min(max(radius, radii[0]), radii[1])),
    }

    def equations(wanted: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        basis = point_basis(geometry["coordinate"], geometry["radius"].clamp(*radii), kernel_size)
        if normalize:
            basis = basis / (basis > 0).sum(1, keepdim=True).clamp(min=1)
        inside = _centre(basis.unflatten(-1, tuple(kernel_size)), size).flatten(2)
        return basis @ basis.mT, inside @ wanted.flatten(2).mT

    numbers = count * max(count, math.prod(kernel_size))
    geometry, weight = fit_separately(equations, targets, start, dict.fromkeys(start, spacing), numbers)
    geometry["radius"].clamp_(*radii)
    return geometry, weight


def _centre(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of a kernel: (..., *K) to (..., *size)."""
    for axis, length in enumerate(size, start=kernel.ndim - len(size)):
        kernel = kernel.narrow(axis, margin(length, kernel.shape[axis]), length)
    return kernel


def _pixels(size: int, like: Tensor) -> Tensor:
    """`size` pixel centres from -1 to 1."""
    steps = torch.arange(size, device=like.device, dtype=like.dtype)
    return (2 * steps - (size - 1)) / max(size - 1, 1)


def _plus_small(
    function: Callable[..., Tensor], kernel_size: Sequence[int], small_weight: Tensor, **inputs: Tensor
) -> Tensor:
    """The kernel of `function` plus a small one at its centre."""
    return function(**inputs, kernel_size=kernel_size) + centred(small_weight, kernel_size)


class SmpKernel(Kernel):
    """Points that move through a kernel (Kim and Park 2023, Eq. 1 and 2).

    Args:
        spec: settings.
        out_channels, in_channels, kernel_size, causal: as for `Kernel`.
        device, dtype: of the parameters.

    Parameters:
        weight: (C_out, C_in/groups, m), m = kernel_count.
        coordinate: (P, m, D), in [-1, 1] inside of the kernel; P is C_out with points="filter", 1 with "layer".
        radius: (P, m), in the unit of coordinate.
        small_weight: (C_out, C_in/groups, *small sizes), only with small_kernel.

    Raises:
        ValueError: from a forward pass, if a coordinate or a radius is not finite. Not on an accelerator, which would
            have to be waited for, nor in compiled graphs.
    """

    geometry_names = ("coordinate", "radius")

    def __init__(
        self,
        spec: SmpSpec,
        out_channels: int,
        in_channels: int,
        kernel_size: Sequence[int],
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_channels, in_channels, kernel_size, causal)
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        ndim, sets = len(self.kernel_size), 1 if spec.points == "layer" else out_channels
        self.kernel_count = spec.kernel_count or _default_count(self.kernel_size)
        self.points = spec.points
        self.normalize = spec.normalize
        self.coordinate_std = spec.coordinate_std
        self.initial_radius = spec.initial_radius
        self.min_radius = spec.min_radius
        self.small_kernel = small_kernel_sizes(spec.small_kernel, self.kernel_size, causal)
        channels = (out_channels, in_channels)
        self.weight = nn.Parameter(empty(*channels, self.kernel_count))
        self.coordinate = nn.Parameter(empty(sets, self.kernel_count, ndim))
        self.radius = nn.Parameter(empty(sets, self.kernel_count))
        self.small_weight = nn.Parameter(empty(*channels, *self.small_kernel)) if self.small_kernel else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of the released code: points near the centre (causal: the newest sample), small radii."""
        coordinate, radius = self.geometry.values()
        nn.init.trunc_normal_(self.weight, std=INITIAL_WEIGHT_STD)
        if self.causal:
            nn.init.trunc_normal_(coordinate, std=self.coordinate_std, a=-1, b=0)
            coordinate.mul_(2).add_(1)
        else:
            nn.init.trunc_normal_(coordinate, std=self.coordinate_std, a=-1, b=1)
        default = min(max(4 / max(self.kernel_size), self.min_radius), LARGEST_RADIUS)
        nn.init.constant_(radius, default if self.initial_radius is None else self.initial_radius)
        if self.small_weight is not None:
            nn.init.kaiming_uniform_(self.small_weight, a=math.sqrt(5))

    def function(self) -> Callable[..., Tensor]:
        function = smp_kernel if self.normalize else smp_sum_kernel
        if self.small_kernel is None:
            return functools.partial(function, kernel_size=self.kernel_size)
        return functools.partial(_plus_small, function=function, kernel_size=self.kernel_size)

    def inputs(self) -> dict[str, Tensor]:
        for name, value in self.geometry.items():
            require_finite(name, value)
        return super().inputs()

    def constrain_(self) -> None:
        """Clip radii to [min_radius, 1]. Coordinates stay free: clipping them costs accuracy (section 3.3)."""
        with torch.no_grad():
            self.geometry["radius"].clamp_(self.min_radius, LARGEST_RADIUS)

    @classmethod
    @torch.no_grad()
    def fit_(cls, kernels: Sequence[Self], targets: Sequence[Tensor]) -> None:
        """Exact where there is a point per pixel of the old kernel, else the least squares found."""
        first = kernels[0]
        stacked = torch.stack([first._for_points(target) for target in targets], 1)
        coordinate, radius = first.geometry.values()
        by_set = stacked.reshape(coordinate.shape[0], -1, *stacked.shape[3:])
        radii = (first.min_radius, LARGEST_RADIUS)
        geometry, weight = fit_points(by_set, first.kernel_size, first.kernel_count, first.normalize, radii)
        coordinate.copy_(geometry["coordinate"])
        radius.copy_(geometry["radius"])
        by_kernel = weight.mT.reshape(*stacked.shape[:3], -1)
        for index, (kernel, target) in enumerate(zip(kernels, targets, strict=True)):
            kernel.weight.copy_(by_kernel[:, index])
            if kernel.small_weight is not None:
                whole = centred(target, kernel.kernel_size)
                kernel.small_weight.copy_(_centre(whole, kernel.small_weight.shape[2:]))

    def _for_points(self, kernel: Tensor) -> Tensor:
        """A kernel less what the small kernel takes over."""
        if self.small_kernel is None:
            return kernel
        rest = centred(kernel, self.kernel_size).clone()
        _centre(rest, self.small_kernel).zero_()
        return _centre(rest, kernel.shape[2:])

    def summary(self) -> str:
        return f" / {self.kernel_count}"

    def extra_repr(self) -> str:
        text = f"kernel_count={self.kernel_count}, points={self.points}, normalize={self.normalize}"
        return text if self.small_kernel is None else f"{text}, small_kernel={self.small_kernel}"


class SmpSpec(KernelSpec):
    """Settings of an SMP layer.

    Attributes:
        kernel_size: size of the constructed kernel, one int for all dimensions or one each.
        kernel_count: m, the points of each kernel, at least 1. Default: a quarter of the kernel's pixels in 2-D
            (released ImageNet code), 30 in 1-D (section 4.2).
        points: "filter" gives each output channel points of its own (section 3.2), "layer" lets all of them share one
            set, for large networks (section 4.3). Weights are never shared.
        normalize: divide by the number of neighbours (Eq. 1), or sum as the released ImageNet models do.
        coordinate_std: standard deviation of the initial coordinates around the kernel's centre (causal: around the
            newest sample); half the kernel is 1. 0.05 is the best of Table 7, 0.2 the released ImageNet code's.
        initial_radius: half the kernel is 1. Default: 4 / K, two pixels of a kernel of size K.
        min_radius: `constrain_` clips radii to [min_radius, 1]; 1e-4, or 1e-3 in the released ImageNet code.
        small_kernel: size of a small dense kernel added at the centre of the large one (section 3.3), None for none.
            It is part of the constructed kernel; `SmpConvBn2d` has one with a batch norm of its own.
    """

    kernel: ClassVar[type[Kernel]] = SmpKernel

    method: Literal["smp"] = "smp"
    kernel_count: Annotated[Int, Field(ge=1, le=LARGEST_COUNT)] | None = None
    points: Points = "filter"
    normalize: bool = True
    coordinate_std: Annotated[float, Field(gt=0, le=1)] = 0.05
    initial_radius: Annotated[float, Field(ge=SMALLEST_RADIUS, le=LARGEST_RADIUS)] | None = None
    min_radius: Annotated[float, Field(ge=SMALLEST_RADIUS, le=LARGEST_RADIUS)] = SMALLEST_RADIUS
    small_kernel: KernelSize | None = None

    def check_kernel(self, conv: PlainConv, sizes: tuple[int, ...]) -> None:
        super().check_kernel(conv, sizes)
        small_kernel_sizes(self.small_kernel, sizes)


class SmpConv1d(KernelConv1d):
    """`nn.Conv1d` with an `SmpKernel`: takes the arguments of `KernelConv1d`, and the settings of `SmpSpec`.

    The padding is "causal" by default.
    """

    spec_class = SmpSpec
    default_padding = "causal"


class SmpConv2d(KernelConv2d):
    """`nn.Conv2d` with an `SmpKernel`: takes the arguments of `KernelConv2d`, and the settings of `SmpSpec`."""

    spec_class = SmpSpec


SmpSpec.layers = {1: SmpConv1d, 2: SmpConv2d}


def _default_count(kernel_size: Sequence[int]) -> int:
    return SEQUENCE_COUNT if len(kernel_size) == 1 else max(1, math.prod(kernel_size) // 4)


def small_kernel_sizes(
    small_kernel: int | Sequence[int] | None, kernel_size: Sequence[int], causal: bool = False
) -> tuple[int, ...] | None:
    """Sizes of a small kernel that has its centre where the large one has it; ValueError if there is none."""
    if small_kernel is None:
        return None
    if causal:
        raise ValueError(f"small_kernel={small_kernel!r}: expected None in a causal convolution; it would be centred")
    given = small_kernel if isinstance(small_kernel, Sequence) else (small_kernel,) * len(kernel_size)
    small = tuple(as_int(size) or 0 for size in given)
    pairs = zip(small, kernel_size, strict=False)
    if len(small) != len(kernel_size) or any(not 1 <= s <= k or (k - s) % 2 for s, k in pairs):
        raise ValueError(
            f"small_kernel={small_kernel!r}: expected at most the kernel_size {tuple(kernel_size)}, and as even or"
            " odd, so that both have the same centre"
        )
    return small
