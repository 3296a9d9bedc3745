"""SmpKernel, and the settings of SMP layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, StrictBool
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.arguments import Int, as_int
from ..core.kernel import Kernel
from ..core.plain import PlainConv, centred, kernels_inside
from ..core.replacement import FIT_TOLERANCE
from ..core.shown import Elements, Quantity, one_per_output
from ..core.spec import KernelSize, KernelSpec
from .fit import fit_points
from .formula import SMALLEST_RADIUS, smp_kernel, smp_sum_kernel

__all__ = ["SmpKernel", "SmpSpec", "placed", "small_kernel_sizes"]

Points = Literal["filter", "layer"]
LARGEST_RADIUS = 1.0  # upper end, in all released code
INITIAL_WEIGHT_STD = 0.02  # released ImageNet code
LARGEST_COUNT = 16384  # a quarter of the pixels of the largest kernel that a spec may ask for
SEQUENCE_COUNT = 30  # points per kernel of a sequence (section 4.2)


class SmpKernel(Kernel):
    """Points that move through a kernel (Kim and Park 2023, Eq. 1 and 2).

    Args:
        spec: settings.
        out_channels, in_channels, kernel_size, causal: as for `Kernel`.
        device, dtype: of the parameters.

    Parameters:
        weight: (C_out, C_in/groups, m), m = kernel_count.
        coordinate: (P, m, D), in [-1, 1] inside the kernel; P is C_out with points="filter", 1 with "layer".
        radius: (P, m), in the unit of coordinate.
        small_weight: (C_out, C_in/groups, *small sizes), only with small_kernel.

    Raises:
        ValueError: from a forward pass, if a coordinate or a radius is not finite (checked on the CPU, outside
            compiled graphs).
    """

    geometry_names = ("coordinate", "radius")
    geometry_lr_scale: ClassVar[Mapping[str, float]] = {"radius": 0.1}  # both released trainings

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
        self.coordinate = nn.Parameter(empty(sets, self.kernel_count, ndim), requires_grad=spec.learn_coordinates)
        self.radius = nn.Parameter(empty(sets, self.kernel_count), requires_grad=spec.learn_radius)
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
        return functools.partial(_plus_small, function=function, kernel_size=self.kernel_size, causal=self.causal)

    def constrain_(self) -> None:
        """Clip radii to [min_radius, 1]. Coordinates are not clipped: that costs accuracy (section 3.3)."""
        with torch.no_grad():
            self.geometry["radius"].clamp_(self.min_radius, LARGEST_RADIUS)

    @classmethod
    @torch.no_grad()
    def fit_(cls, kernels: Sequence[Self], targets: Sequence[Tensor], tolerance: float = FIT_TOLERANCE) -> None:
        """Exact with a point per pixel of the old kernel, otherwise a least squares fit."""
        first = kernels[0]
        stacked = torch.stack([first._for_points(target) for target in targets], 1)
        coordinate, radius = first.geometry.values()
        by_set = stacked.reshape(coordinate.shape[0], -1, *stacked.shape[3:])
        radii = (first.min_radius, LARGEST_RADIUS)
        geometry, weight = fit_points(by_set, first.kernel_size, first.kernel_count, first.normalize, radii, tolerance)
        coordinate.copy_(geometry["coordinate"])
        radius.copy_(geometry["radius"])
        by_kernel = weight.mT.reshape(*stacked.shape[:3], -1)
        for index, (kernel, target) in enumerate(zip(kernels, targets, strict=True)):
            kernel.weight.copy_(by_kernel[:, index])
            if kernel.small_weight is not None:
                kernel.small_weight.copy_(kernel._small_part(target))

    def _for_points(self, kernel: Tensor) -> Tensor:
        """A kernel without the part that the small kernel holds."""
        if self.small_kernel is None:
            return kernel
        if self.causal:  # the newest sample is in the full size only
            kernel = centred(kernel, self.kernel_size)
        return kernel - placed(self._small_part(kernel), kernel.shape[2:], self.causal)

    def _small_part(self, kernel: Tensor) -> Tensor:
        """What the small kernel holds of a kernel."""
        assert self.small_kernel is not None
        return placed(centred(kernel, self.kernel_size), self.small_kernel, self.causal)

    def summary(self) -> str:
        return f" / {self.kernel_count}"

    @torch.no_grad()
    def shown_elements(self) -> Elements:
        coordinate, radius = self._in_pixels()
        last = coordinate.new_tensor(self.kernel_size) - 1
        reach = radius.unsqueeze(-1).expand_as(coordinate)
        weight = one_per_output(self.weight.detach())
        return Elements(coordinate + last / 2, "diamond", reach, weight=weight, label="point")

    @torch.no_grad()
    def shown_quantities(self) -> tuple[Quantity, ...]:
        coordinate, radius = self._in_pixels()
        return (
            Quantity("distance of points from the centre", "pixels", coordinate.flatten(0, 1)),
            Quantity("radius of points", "pixels", radius.reshape(-1, 1)),
        )

    def _in_pixels(self) -> tuple[Tensor, Tensor]:
        """Coordinates from the kernel's centre and radii; a radius in pixels of the longest dimension."""
        coordinate, radius = (value.detach() for value in self.geometry.values())
        half = (coordinate.new_tensor(self.kernel_size) - 1) / 2
        return coordinate * half, radius.clamp(min=SMALLEST_RADIUS) * half.max()

    def extra_repr(self) -> str:
        text = f"kernel_count={self.kernel_count}, points={self.points}, normalize={self.normalize}"
        return text if self.small_kernel is None else f"{text}, small_kernel={self.small_kernel}"


class SmpSpec(KernelSpec):
    """Settings of an SMP layer.

    Attributes:
        kernel_size: size of the constructed kernel, one int for all dimensions or one each.
        kernel_count: m, the points of each kernel, at least 1. Default: a quarter of the kernel's pixels in 2-D
            (released ImageNet code), 30 in 1-D (section 4.2), and more if the fit of the old kernels needs them.
        points: "filter" gives each output channel points of its own (section 3.2), "layer" lets all channels share one
            set, for large networks (section 4.3). Weights are never shared.
        normalize: divide by the number of neighbours (Eq. 1), or sum as the released ImageNet models do.
        coordinate_std: standard deviation of the initial coordinates around the kernel's centre (causal: around the
            newest sample); half the kernel is 1. 0.05 is the best of Table 7; the released ImageNet code has 0.2.
        initial_radius: half the kernel is 1. Default: 4 / K, two pixels of a kernel of size K.
        min_radius: `constrain_` clips radii to [min_radius, 1]; the released ImageNet code has 1e-3.
        small_kernel: size of a small kernel with free weights, added at the centre of the large one (causal: at the
            newest sample) (section 3.3); None for none. `SmpConvBn2d` has one with a batch norm of its own.
        learn_coordinates, learn_radius: False keeps them as they start (Table 6).
    """

    kernel: ClassVar[type[Kernel]] = SmpKernel
    fit_advice: ClassVar[str] = (
        "Leave kernel_count out, or give at least as many points as the old kernels have pixels; a kernel_size below"
        " the old one cuts kernels off."
    )

    method: Literal["smp"] = "smp"
    kernel_count: Annotated[Int, Field(ge=1, le=LARGEST_COUNT)] | None = None
    points: Points = "filter"
    normalize: bool = True
    coordinate_std: Annotated[float, Field(gt=0, le=1)] = 0.05
    initial_radius: Annotated[float, Field(ge=SMALLEST_RADIUS, le=LARGEST_RADIUS)] | None = None
    min_radius: Annotated[float, Field(ge=SMALLEST_RADIUS, le=LARGEST_RADIUS)] = SMALLEST_RADIUS
    small_kernel: KernelSize | None = None
    learn_coordinates: StrictBool = True
    learn_radius: StrictBool = True

    def check_conv(self, conv: PlainConv) -> None:
        super().check_conv(conv)
        small_kernel_sizes(self.small_kernel, self.sizes(len(conv.kernel_size)))

    def for_fit(self, convs: Sequence[PlainConv], tolerance: float) -> Self:
        """Take as many points as the kernels have pixels, if kernel_count is None and the default is smaller."""
        if self.kernel_count is not None:
            return self
        sizes = self.sizes(len(convs[0].kernel_size))
        pixels = kernels_inside(convs, sizes)[0].shape[2:].numel()
        return self.model_copy(update={"kernel_count": max(_default_count(sizes), min(pixels, LARGEST_COUNT))})


def _plus_small(
    function: Callable[..., Tensor], kernel_size: Sequence[int], causal: bool, small_weight: Tensor, **inputs: Tensor
) -> Tensor:
    """The kernel of `function` plus a small one."""
    return function(**inputs, kernel_size=kernel_size) + placed(small_weight, kernel_size, causal)


def placed(kernel: Tensor, size: Sequence[int], causal: bool) -> Tensor:
    """A kernel in another size with the same centre; a causal one with the same last pixel, the newest sample."""
    return F.pad(kernel, (size[0] - kernel.shape[-1], 0)) if causal else centred(kernel, size)


def _default_count(kernel_size: Sequence[int]) -> int:
    return SEQUENCE_COUNT if len(kernel_size) == 1 else max(1, math.prod(kernel_size) // 4)


def small_kernel_sizes(
    small_kernel: int | Sequence[int] | None, kernel_size: Sequence[int], causal: bool = False
) -> tuple[int, ...] | None:
    """Sizes of a small kernel; a ValueError if it can't have the centre of the large one, or is longer (causal)."""
    if small_kernel is None:
        return None
    given = small_kernel if isinstance(small_kernel, Sequence) else (small_kernel,) * len(kernel_size)
    small = tuple(as_int(size) or 0 for size in given)
    pairs = zip(small, kernel_size, strict=False)
    if len(small) != len(kernel_size) or any(not 1 <= s <= k or (not causal and (k - s) % 2) for s, k in pairs):
        raise ValueError(
            f"small_kernel={small_kernel!r}: expected at most the kernel_size {tuple(kernel_size)}"
            + ("" if causal else ", and odd or even as that is, so that both have the same centre")
        )
    return small
