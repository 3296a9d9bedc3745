"""Dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2023): kernel elements that move.

A kernel is a sum of `kernel_count` elements. Each has a weight, a real-valued position and, for the triangle and
Gauss interpolations, a width; interpolation spreads it over the pixels around its position.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..ops import is_transformed
from .core.arguments import Int
from .core.kernel import Kernel
from .core.kernel_conv import KernelConv1d, KernelConv2d, KernelConv3d
from .core.least_squares import Geometry, fit_separately, pixels_by_energy
from .core.plain import PlainConv, centred, margin
from .core.spec import KernelSpec

__all__ = [
    "DclsConv1d",
    "DclsConv2d",
    "DclsConv3d",
    "DclsKernel",
    "DclsSpec",
    "bilinear_kernel",
    "gauss_kernel",
    "repulsion",
    "triangle_kernel",
]

Interpolation = Literal["bilinear", "triangle", "gauss"]
#: factors (..., m, K_d) along every axis, and the normalisation (..., m) of Eq. 11; None without one
Factors = tuple[list[Tensor], Tensor | None]

TRIANGLE_MIN_WIDTH = 1.0  # sigma_0 of Eq. 9
GAUSS_MIN_WIDTH = 0.27  # sigma_0 of Eq. 10
NORMALIZATION_EPS = 1e-7  # epsilon of Eq. 11
INITIAL_SIGMA = {"triangle": 0.0, "gauss": 0.23}  # Appendix C
SMALLEST_START_SIGMA = 0.1  # of a fit: at 0 an element on a pixel reaches no other, and has no gradient
INITIAL_POSITION_STD = 0.5  # Appendix C


def bilinear_kernel(weight: Tensor, position: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense DCLS kernel with bilinear interpolation (Khalfaoui-Hassani et al. 2023, Eq. 2, 4 and 12).

    Args:
        weight: (C_out, C_in/groups, m) element weights.
        position: (D, C_out, C_in/groups, m) element positions, in pixels from the kernel centre K // 2.
        kernel_size: D ints.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel. What lies outside of the kernel is lost.
    """
    return _sum_of_products(weight, *bilinear_factors(position, kernel_size))


def triangle_kernel(weight: Tensor, position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense DCLS kernel with triangle interpolation (Khalfaoui-Hassani et al. 2023, Eq. 9 and 11).

    Args:
        weight: (C_out, C_in/groups, m) element weights.
        position: (D, C_out, C_in/groups, m) element positions, in pixels from the kernel centre K // 2.
        sigma: like position; an element reaches 1 + |sigma| pixels to either side.
        kernel_size: D ints.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel; every element is normalised to a sum of 1 over the kernel.
    """
    return _sum_of_products(weight, *triangle_factors(position, sigma, kernel_size))


def gauss_kernel(weight: Tensor, position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense DCLS kernel with Gaussian interpolation (Khalfaoui-Hassani et al. 2023, Eq. 10 and 11).

    Args:
        weight: (C_out, C_in/groups, m) element weights.
        position: (D, C_out, C_in/groups, m) element positions, in pixels from the kernel centre K // 2.
        sigma: like position; the effective width is 0.27 + |sigma| pixels.
        kernel_size: D ints.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel; every element is normalised to a sum of 1 over the kernel.
    """
    return _sum_of_products(weight, *gauss_factors(position, sigma, kernel_size))


def repulsion(position: Tensor) -> Tensor:
    """How close the elements of a kernel are to one another, 0 to 1 (released ConvNeXt-dcls training code).

    Args:
        position: (D, C_out, C_in/groups, m) element positions, in pixels.

    Returns:
        Scalar: the mean over channels and pairs of elements of max(0, 1 - distance).
    """
    count = position.shape[-1]
    first, second = torch.triu_indices(count, count, offset=1, device=position.device)
    distance = torch.linalg.vector_norm(position[..., first] - position[..., second], dim=0)
    return (1 - distance).relu().sum() / max(1, distance.numel())


def bilinear_factors(position: Tensor, kernel_size: Sequence[int]) -> Factors:
    """How far every element reaches every pixel along every axis."""
    return [_hat(_distance(position[d], size)) for d, size in enumerate(kernel_size)], None


def triangle_factors(position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Factors:
    """As `bilinear_factors`, with the normalisation of Eq. 11."""
    widths = TRIANGLE_MIN_WIDTH + sigma.abs()
    factors = [
        (widths[d].unsqueeze(-1) - _distance(position[d], size).abs()).relu() for d, size in enumerate(kernel_size)
    ]
    return factors, _mass(factors)


def gauss_factors(position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Factors:
    """As `triangle_factors`."""
    widths = GAUSS_MIN_WIDTH + sigma.abs()
    bell = _bell if is_transformed() else _Bell.apply
    factors = [bell(position[d], widths[d], size) for d, size in enumerate(kernel_size)]
    return factors, _mass(factors)


def _distance(position: Tensor, size: int) -> Tensor:
    """Signed distance of every pixel of an axis, `size` of them, to every element: (..., m, size)."""
    pixels = torch.arange(size, device=position.device, dtype=position.dtype) - size // 2
    return pixels - position.unsqueeze(-1)


def _hat(distance: Tensor) -> Tensor:
    """max(0, 1 - |distance|) with the right-hand derivative in the position at its kinks.

    The derivative of abs() and relu() is 0 there, so an element on a whole pixel would never move. NaN stays NaN, so
    that errors are seen.
    """
    hat = torch.where(distance > 0, 1 - distance, 1 + distance)
    return torch.where((distance <= -1) | (distance > 1), 0, hat)


def _bell(position: Tensor, width: Tensor, size: int) -> Tensor:
    """exp(-(distance / width)^2 / 2): (..., m) twice to (..., m, size)."""
    return torch.exp(-0.5 * (_distance(position, size) / width.unsqueeze(-1)).square())


class _Bell(torch.autograd.Function):
    """`_bell` with a gradient that takes a third of the passes over memory that autograd takes.

    With g = exp(-t^2 / 2), t = distance / width: dg/dposition = g t / width and dg/dwidth = g t^2 / width. The
    backward uses differentiable operators on the inputs and the output, so derivatives of any order are right.
    """

    @staticmethod
    def forward(position: Tensor, width: Tensor, size: int) -> Tensor:
        return _distance(position, size).div_(width.unsqueeze(-1)).square_().mul_(-0.5).exp_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        position, width, _ = inputs
        ctx.save_for_backward(position, width, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        position, width, bell = ctx.saved_tensors
        t = _distance(position, bell.shape[-1]) / width.unsqueeze(-1)
        once = grad * bell * t
        grad_position = once.sum(-1) / width if ctx.needs_input_grad[0] else None
        grad_width = (once * t).sum(-1) / width if ctx.needs_input_grad[1] else None
        return grad_position, grad_width, None


def _mass(factors: Sequence[Tensor]) -> Tensor:
    """Normalisation of Eq. 11. The sum over the kernel of a product over axes is the product of the sums."""
    return NORMALIZATION_EPS + functools.reduce(operator.mul, [factor.sum(-1) for factor in factors])


def _sum_of_products(weight: Tensor, factors: Sequence[Tensor], mass: Tensor | None) -> Tensor:
    """Sum over the elements k of weight_k / mass_k times the outer product of its factors.

    A matrix product over k: no tensor of kernel size x count is built.

    Args:
        weight: (..., m).
        factors: D tensors (..., m, K_d).
        mass: (..., m), or None for 1.

    Returns:
        (..., K_1, ..., K_D).
    """
    *leading, last = factors
    weight = weight if mass is None else weight / mass
    rows = _outer([weight.unsqueeze(-1), *leading])
    kernel = torch.bmm(rows.flatten(0, -3).transpose(1, 2), last.flatten(0, -3))
    return kernel.view(weight.shape[:-1] + tuple(factor.shape[-1] for factor in factors))


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """Outer products over the last axes, flattened: (..., K_1), ..., (..., K_D) to (..., K_1 * ... * K_D)."""
    return functools.reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), factors)


KERNEL_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "bilinear": bilinear_kernel,
    "triangle": triangle_kernel,
    "gauss": gauss_kernel,
}
FACTORS: dict[str, Callable[..., Factors]] = {
    "bilinear": bilinear_factors,
    "triangle": triangle_factors,
    "gauss": gauss_factors,
}


class DclsKernel(Kernel):
    """Elements that move (Khalfaoui-Hassani et al. 2023, Algorithm 1).

    Args:
        spec: settings.
        out_channels, in_channels, kernel_size, causal: as for `Kernel`.
        device, dtype: of the parameters.

    Parameters:
        weight: (C_out, C_in/groups, *dense sizes, m), m = kernel_count.
        position: (moving dimensions, *weight.shape), in pixels from the kernel centre.
        sigma: like position; not for "bilinear".
    """

    geometry_lr_scale = 5.0  # Appendix C

    def __init__(
        self,
        spec: DclsSpec,
        out_channels: int,
        in_channels: int,
        kernel_size: Sequence[int],
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_channels, in_channels, kernel_size, causal)
        if spec.kernel_count is None:
            raise ValueError(
                "kernel_count=None: expected a positive int; tcc.patch computes it for a model, by the paper's rule"
            )
        self.kernel_count = spec.kernel_count
        self.interpolation = spec.interpolation
        self.position_dims = check_position_dims(spec.position_dims, len(self.kernel_size))
        self.moving = tuple(self.kernel_size[d] for d in self.position_dims)
        dense = [k for d, k in enumerate(self.kernel_size) if d not in self.position_dims]
        shape = (out_channels, in_channels, *dense, self.kernel_count)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.geometry_names = ("position",) if self.interpolation == "bilinear" else ("position", "sigma")
        for name in self.geometry_names:
            value = torch.empty((len(self.moving), *shape), device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(value))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of Appendix C: weights as in `nn.Conv2d`, positions N(0, 0.5), constant widths."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.normal_(self.geometry["position"], 0, INITIAL_POSITION_STD)
        self._clamp_positions_()
        if self.interpolation != "bilinear":
            nn.init.constant_(self.geometry["sigma"], INITIAL_SIGMA[self.interpolation])

    @property
    def bias_bound(self) -> float:
        return 1 / math.sqrt(self.weight[0].numel())

    def function(self) -> Callable[..., Tensor]:
        function = KERNEL_FUNCTIONS[self.interpolation]
        if len(self.moving) == len(self.kernel_size):
            return functools.partial(function, kernel_size=self.moving)
        return functools.partial(
            _partly_dense_kernel, function=function, kernel_size=self.moving, position_dims=self.position_dims
        )

    def constrain_(self) -> None:
        """Clamp positions into the kernel, for "bilinear" only (Appendix C)."""
        if self.interpolation == "bilinear":
            self._clamp_positions_()

    def penalty(self) -> Tensor:
        """The repulsion between the kernel's elements."""
        return repulsion(self.geometry["position"])

    @torch.no_grad()
    def _clamp_positions_(self) -> None:
        for axis, size in enumerate(self.moving):
            self.geometry["position"][axis].clamp_(-(size // 2), size - 1 - size // 2)

    @classmethod
    @torch.no_grad()
    def fit_(cls, kernels: Sequence[Self], targets: Sequence[Tensor]) -> None:
        """Exact for "bilinear" with an element per pixel of the old kernel, else the least squares found."""
        first = kernels[0]
        ndim = len(first.moving)
        moving_last = torch.stack([first._moving_last(target) for target in targets], -ndim - 1)
        geometry, weight = fit_elements(
            moving_last.flatten(0, -ndim - 2), first.moving, first.kernel_count, first.interpolation
        )
        for name, value in geometry.items():
            parameter = first.geometry[name]
            parameter.copy_(value.movedim(-1, 0).view_as(parameter))
        for index, kernel in enumerate(kernels):
            kernel.weight.copy_(weight[..., index].view_as(kernel.weight))

    def _moving_last(self, kernel: Tensor) -> Tensor:
        """A kernel with its full size along the dense axes: (C_out, C_in/groups, *dense sizes, *moving sizes)."""
        sizes = [k if d in self.position_dims else self.kernel_size[d] for d, k in enumerate(kernel.shape[2:])]
        ends = tuple(range(-len(self.position_dims), 0))
        return centred(kernel, sizes).movedim(tuple(2 + d for d in self.position_dims), ends)

    def summary(self) -> str:
        return f" / {self.kernel_count}"

    def extra_repr(self) -> str:
        text = f"kernel_count={self.kernel_count}, interpolation={self.interpolation}"
        return text if len(self.moving) == len(self.kernel_size) else f"{text}, position_dims={self.position_dims}"


class DclsSpec(KernelSpec):
    """Settings of a DCLS layer.

    Attributes:
        kernel_size: size of the constructed kernel, one int for all dimensions or one each.
        interpolation: "bilinear", "triangle" or "gauss".
        kernel_count: m, elements per kernel, at least 1. In a patch None means the parameter rule of Appendix C: the
            largest number for which the model has no more parameters than before.
        position_dims: spatial dimensions along which elements move; None means all. Along the others the kernel is
            dense: every one of its pixels there has `kernel_count` elements of its own.
    """

    kernel: ClassVar[type[Kernel]] = DclsKernel

    method: Literal["dcls"] = "dcls"
    interpolation: Interpolation = "gauss"
    kernel_count: Annotated[Int, Field(ge=1, le=4096)] | None = None
    position_dims: tuple[Annotated[Int, Field(ge=0, le=2)], ...] | None = None

    def resolve(self, groups: Sequence[Sequence[PlainConv]]) -> Self:
        """Compute kernel_count by the parameter rule of Appendix C, positions and widths counted once a group."""
        if self.kernel_count is not None:
            return self
        available = sum(conv.weight.numel() for group in groups for conv in group)
        per_element = sum(self._parameters_per_element(group) for group in groups)
        if available < per_element:
            raise ValueError(
                f"kernel_count: {available} parameters in the convolutions to replace are too few for one element"
                f" per kernel ({per_element}); give kernel_count yourself"
            )
        return self.model_copy(update={"kernel_count": int(available // per_element)})

    def _parameters_per_element(self, group: Sequence[PlainConv]) -> int:
        ndim = len(group[0].kernel_size)
        moving = check_position_dims(self.position_dims, ndim)
        dense = math.prod(k for d, k in enumerate(self.sizes(ndim)) if d not in moving)
        places = [conv.weight.shape[:2].numel() * dense for conv in group]
        shared_kinds = len(moving) * (1 if self.interpolation == "bilinear" else 2)
        return sum(places) + shared_kinds * places[0]


class DclsConv1d(KernelConv1d):
    """`nn.Conv1d` with a `DclsKernel`: takes the arguments of `KernelConv1d`, and the settings of `DclsSpec`."""

    spec_class = DclsSpec


class DclsConv2d(KernelConv2d):
    """`nn.Conv2d` with a `DclsKernel`: takes the arguments of `KernelConv2d`, and the settings of `DclsSpec`."""

    spec_class = DclsSpec


class DclsConv3d(KernelConv3d):
    """`nn.Conv3d` with a `DclsKernel`: takes the arguments of `KernelConv3d`, and the settings of `DclsSpec`."""

    spec_class = DclsSpec


DclsSpec.layers = {1: DclsConv1d, 2: DclsConv2d, 3: DclsConv3d}


def fit_elements(
    targets: Tensor, kernel_size: Sequence[int], count: int, interpolation: Interpolation
) -> tuple[dict[str, Tensor], Tensor]:
    """Positions and widths common to n kernels, and weights for each, that come near the kernels in least squares.

    Elements start on the pixels that matter most, which is exact for "bilinear" where there are enough of them.

    Args:
        targets: (B, n, *size); each of the B problems has elements of its own.
        kernel_size: D ints, at least the targets' size; the targets lie at its centre.
        count: m elements.
        interpolation: "bilinear", "triangle" or "gauss".

    Returns:
        {"position": (B, m, D), for "triangle" and "gauss" also "sigma"}, and weights (B, m, n), all float64 on the
        CPU.
    """
    targets = targets.detach().double().cpu()
    margins = [margin(old, new) for old, new in zip(targets.shape[2:], kernel_size, strict=True)]
    offset = targets.new_tensor([m - k // 2 for m, k in zip(margins, kernel_size, strict=True)])
    start = {"position": pixels_by_energy(targets, len(kernel_size), count) + offset}
    if interpolation != "bilinear":
        start["sigma"] = torch.full_like(start["position"], max(INITIAL_SIGMA[interpolation], SMALLEST_START_SIGMA))

    def equations(wanted: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        axes_first = {name: value.movedim(-1, 0) for name, value in geometry.items()}
        factors, mass = FACTORS[interpolation](**axes_first, kernel_size=kernel_size)
        if mass is not None:
            factors[0] = factors[0] / mass.unsqueeze(-1)
        gram = functools.reduce(operator.mul, [factor @ factor.mT for factor in factors])
        inside = [f[..., m : m + k] for f, m, k in zip(factors, margins, wanted.shape[2:], strict=True)]
        return gram, _outer(inside) @ wanted.flatten(2).mT

    numbers = count * max(count, targets.shape[2:].numel(), *kernel_size)
    return fit_separately(equations, targets, start, dict.fromkeys(start, 1.0), numbers)


def _partly_dense_kernel(
    function: Callable[..., Tensor], kernel_size: Sequence[int], position_dims: Sequence[int], **inputs: Tensor
) -> Tensor:
    """A kernel whose elements move along `position_dims` only: the dense dimensions act as more channels."""
    kernel = function(**inputs, kernel_size=kernel_size)
    return kernel.movedim(tuple(range(-len(position_dims), 0)), tuple(2 + d for d in position_dims))


def check_position_dims(dims: Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Dimensions along which elements move; all of `ndim` for None.

    Raises:
        ValueError: they are not ascending dimensions of the kernel.
    """
    if dims is None:
        return tuple(range(ndim))
    if not dims or sorted(set(dims)) != list(dims) or dims[0] < 0 or dims[-1] >= ndim:
        raise ValueError(f"position_dims={dims!r}: expected ascending spatial dimensions out of 0..{ndim - 1}")
    return tuple(dims)
