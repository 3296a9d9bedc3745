"""Dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2023): kernel elements that move.

A kernel is a sum of `kernel_count` elements. Each has a weight, a real-valued position and, for the triangle and
Gauss interpolations, a width; interpolation spreads it over the pixels around its position.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from .arguments import as_int
from .base import ConstructedConv, plain_arguments
from .compilation import CompileMode
from .least_squares import Geometry, fit_separately, pixels_by_energy
from .replacement import ConvReplacement, PlainConv, centred, copy_bias_, kernels_inside, margin, require_weights
from .spec import KernelSpec

__all__ = [
    "DclsConv1d",
    "DclsConv2d",
    "DclsConv3d",
    "DclsSpec",
    "bilinear_kernel",
    "gauss_kernel",
    "repulsion",
    "triangle_kernel",
]

Interpolation = Literal["bilinear", "triangle", "gauss"]

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
    return interpolated_kernel(weight, **bilinear_interpolation(position, kernel_size))


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
    return interpolated_kernel(weight, **triangle_interpolation(position, sigma, kernel_size))


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
    return interpolated_kernel(weight, **gauss_interpolation(position, sigma, kernel_size))


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


def bilinear_interpolation(position: Tensor, kernel_size: Sequence[int]) -> dict[str, Tensor]:
    """How far every element reaches every pixel along every axis: factors (..., m, K_d) named "axis0", "axis1", ..."""
    return _named([_hat(_distance(position[d], size)) for d, size in enumerate(kernel_size)])


def triangle_interpolation(position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> dict[str, Tensor]:
    """As `bilinear_interpolation`, with the normalisation of Eq. 11 as "mass" (..., m)."""
    widths = TRIANGLE_MIN_WIDTH + sigma.abs()
    factors = [
        (widths[d].unsqueeze(-1) - _distance(position[d], size).abs()).relu() for d, size in enumerate(kernel_size)
    ]
    return {**_named(factors), "mass": _mass(factors)}


def gauss_interpolation(position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> dict[str, Tensor]:
    """As `triangle_interpolation`."""
    widths = GAUSS_MIN_WIDTH + sigma.abs()
    factors = [
        torch.exp(-0.5 * (_distance(position[d], size) / widths[d].unsqueeze(-1)).square())
        for d, size in enumerate(kernel_size)
    ]
    return {**_named(factors), "mass": _mass(factors)}


def interpolated_kernel(weight: Tensor, mass: Tensor | None = None, **factors: Tensor) -> Tensor:
    """The dense kernel of elements whose interpolation is known, which does not depend on their weights."""
    return _sum_of_products(weight if mass is None else weight / mass, list(factors.values()))


def _named(factors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"axis{d}": factor for d, factor in enumerate(factors)}


def _distance(position: Tensor, size: int) -> Tensor:
    """Signed distance of every pixel of an axis, `size` of them, to every element: (..., m, size)."""
    pixels = torch.arange(size, device=position.device, dtype=position.dtype) - size // 2
    return pixels - position.unsqueeze(-1)


def _hat(distance: Tensor) -> Tensor:
    """max(0, 1 - |distance|) with the right-hand derivative in the position at its kinks.

    That of abs() and relu() is 0 there, so that an element on a whole pixel would never move.
    """
    hat = torch.where(distance > 0, 1 - distance, 1 + distance)
    return torch.where((distance <= -1) | (distance > 1), 0, hat)  # NaN shows


def _mass(factors: Sequence[Tensor]) -> Tensor:
    """Normalisation of Eq. 11. The sum over the kernel of a product over axes is the product of the sums."""
    return NORMALIZATION_EPS + functools.reduce(operator.mul, [factor.sum(-1) for factor in factors])


def _sum_of_products(weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Sum over the elements k of weight_k times the outer product of its factors.

    A matrix product over k: no tensor of kernel size x count is built.

    Args:
        weight: (..., m).
        factors: D tensors (..., m, K_d).

    Returns:
        (..., K_1, ..., K_D).
    """
    *leading, last = factors
    rows = _outer([weight.unsqueeze(-1), *leading])
    kernel = torch.bmm(rows.flatten(0, -3).transpose(1, 2), last.flatten(0, -3))
    return kernel.view(weight.shape[:-1] + tuple(factor.shape[-1] for factor in factors))


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """Outer products over the last axes, flattened: (..., K_1), ..., (..., K_D) to (..., K_1 * ... * K_D)."""
    return functools.reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), factors)


class _DclsConv(ConstructedConv):
    """Dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2023).

    Takes the arguments of `ConstructedConv`, and

    Args:
        kernel_count: m, the elements of each kernel.
        interpolation: "bilinear", "triangle" or "gauss".
        position_dims: the spatial dimensions along which elements move, all by default. Along the others the
            kernel is dense: every one of its pixels there has `kernel_count` elements of its own.

    Parameters:
        element_weight: (C_out, C_in/groups, *dense sizes, m).
        geometry["position"]: (moving dimensions, *element_weight.shape), in pixels from the kernel centre.
        geometry["sigma"]: likewise, not for "bilinear".
        bias: (C_out,).
    """

    method = "dcls"
    geometry_lr_scale = 5.0  # Appendix C

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernel_count: int,
        interpolation: Interpolation = "gauss",
        position_dims: Sequence[int] | None = None,
        compile: CompileMode = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, compile=compile,
        )  # fmt: skip
        elements = as_int(kernel_count)
        if elements is None or elements < 1:
            raise ValueError(
                f"kernel_count={kernel_count!r}: expected a positive int; DCLS needs at least one element per kernel"
            )
        if interpolation not in KERNEL_FUNCTIONS:
            raise ValueError(f"interpolation={interpolation!r}: expected one of {', '.join(KERNEL_FUNCTIONS)}")
        self.kernel_count = kernel_count = elements
        self.interpolation = interpolation
        self.position_dims = _position_dims(position_dims, self.ndim)
        dense = [k for d, k in enumerate(self.kernel_size) if d not in self.position_dims]
        shape = (out_channels, in_channels // groups, *dense, kernel_count)
        self.element_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        names = ("position",) if interpolation == "bilinear" else ("position", "sigma")
        moving = (len(self.position_dims), *shape)
        self.geometry = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(moving, device=device, dtype=dtype)) for name in names}
        )
        self.reset_parameters()

    @property
    def position(self) -> Tensor:
        """Element positions, in pixels from the kernel centre; shared layers return the shared ones."""
        return self.geometry["position"]

    @property
    def sigma(self) -> Tensor | None:
        """Element widths before their absolute value and lower bound; None for "bilinear"."""
        return self.geometry["sigma"] if self.interpolation != "bilinear" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of Appendix C: weights as in `nn.Conv2d`, positions N(0, 0.5), constant widths."""
        nn.init.kaiming_uniform_(self.element_weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.element_weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.position, 0, INITIAL_POSITION_STD)
        self._clamp_positions_()
        if self.sigma is not None:
            nn.init.constant_(self.sigma, INITIAL_SIGMA[self.interpolation])

    def kernel_inputs(self) -> Mapping[str, Tensor]:
        return {"weight": self.element_weight, **self.geometry}

    def kernel_function(self) -> Callable[..., Tensor]:
        return self._along_moving_axes(
            functools.partial(KERNEL_FUNCTIONS[self.interpolation], kernel_size=self._moving)
        )

    def interpolation_function(self) -> Callable[..., dict[str, Tensor]]:
        return functools.partial(INTERPOLATIONS[self.interpolation], kernel_size=self._moving)

    def interpolated_kernel_function(self) -> Callable[..., Tensor]:
        return self._along_moving_axes(functools.partial(interpolated_kernel))

    @property
    def _moving(self) -> tuple[int, ...]:
        """The kernel's size along the axes that elements move along."""
        return tuple(self.kernel_size[d] for d in self.position_dims)

    def _along_moving_axes(self, function: functools.partial[Tensor]) -> Callable[..., Tensor]:
        if len(self.position_dims) == self.ndim:
            return function
        settings = tuple(function.keywords.items())
        return functools.partial(
            _partly_dense_kernel, function=function.func, settings=settings, position_dims=self.position_dims
        )

    def constrain_(self) -> None:
        """Clamp positions into the kernel, for "bilinear" only (Appendix C)."""
        if self.interpolation == "bilinear":
            self._clamp_positions_()

    def penalty(self) -> Tensor:
        """The repulsion between this layer's elements."""
        return repulsion(self.position)

    @torch.no_grad()
    def _clamp_positions_(self) -> None:
        for axis, dim in enumerate(self.position_dims):
            size = self.kernel_size[dim]
            self.position[axis].clamp_(-(size // 2), size - 1 - size // 2)

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: DclsSpec) -> Self:
        """A DCLS layer in place of `conv`, with the kernel of `spec`.

        Raises:
            ValueError: spec has no kernel_count; the kernel can't be centred on the old one.
        """
        if spec.kernel_count is None:
            raise ValueError("kernel_count=None: expected a positive int; spec.resolve computes it for a model")
        return cls(
            **plain_arguments(conv, spec.sizes(cls.ndim)),
            kernel_count=spec.kernel_count,
            interpolation=spec.interpolation,
            position_dims=spec.position_dims,
        )

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv]) -> None:
        """Exact for "bilinear" with an element per pixel of the old kernel, else the least squares found."""
        require_weights(convs)
        first = layers[0]
        moving = first._moving
        kernels = [first._moving_last(kernel) for kernel in kernels_inside(convs, first.kernel_size)]
        targets = torch.stack(kernels, -len(moving) - 1)
        geometry, weight = fit_elements(
            targets.flatten(0, -len(moving) - 2), moving, first.kernel_count, first.interpolation
        )
        for name, value in geometry.items():
            first.geometry[name].copy_(value.movedim(-1, 0).view_as(first.geometry[name]))
        for index, (layer, conv) in enumerate(zip(layers, convs, strict=True)):
            layer.element_weight.copy_(weight[..., index].view_as(layer.element_weight))
            copy_bias_(layer, conv)

    def _moving_last(self, kernel: Tensor) -> Tensor:
        """A kernel with its full size along the dense axes: (C_out, C_in/groups, *dense sizes, *moving sizes)."""
        sizes = [k if d in self.position_dims else self.kernel_size[d] for d, k in enumerate(kernel.shape[2:])]
        ends = tuple(range(-len(self.position_dims), 0))
        return centred(kernel, sizes).movedim(tuple(2 + d for d in self.position_dims), ends)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, kernel_count={self.kernel_count}, interpolation={self.interpolation}"
        return text if len(self.position_dims) == self.ndim else f"{text}, position_dims={self.position_dims}"


class DclsConv1d(_DclsConv):
    __doc__ = _DclsConv.__doc__
    ndim = 1


class DclsConv2d(_DclsConv):
    __doc__ = _DclsConv.__doc__
    ndim = 2


class DclsConv3d(_DclsConv):
    __doc__ = _DclsConv.__doc__
    ndim = 3


INTERPOLATIONS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "bilinear": bilinear_interpolation,
    "triangle": triangle_interpolation,
    "gauss": gauss_interpolation,
}
KERNEL_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "bilinear": bilinear_kernel,
    "triangle": triangle_kernel,
    "gauss": gauss_kernel,
}


class DclsSpec(KernelSpec):
    """Settings of a DCLS layer.

    Attributes:
        interpolation: "bilinear", "triangle" or "gauss".
        kernel_size: size of the constructed kernel, one int for all dimensions or one each.
        kernel_count: elements per kernel; None means the parameter rule of Appendix C: the largest number for
            which the model has no more parameters than before.
        position_dims: spatial dimensions along which elements move; None means all.
    """

    layers: ClassVar[dict[int, type[ConvReplacement]]] = {1: DclsConv1d, 2: DclsConv2d, 3: DclsConv3d}

    method: Literal["dcls"] = "dcls"
    interpolation: Interpolation
    kernel_count: Annotated[int, Field(ge=1, le=4096)] | None = None
    position_dims: tuple[Annotated[int, Field(ge=0, le=2)], ...] | None = None

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
        moving = _position_dims(self.position_dims, ndim)
        dense = math.prod(k for d, k in enumerate(self.sizes(ndim)) if d not in moving)
        places = [conv.weight.shape[:2].numel() * dense for conv in group]
        shared_kinds = len(moving) * (1 if self.interpolation == "bilinear" else 2)
        return sum(places) + shared_kinds * places[0]


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
        reach = INTERPOLATIONS[interpolation](**axes_first, kernel_size=kernel_size)
        mass = reach.pop("mass", None)
        factors = list(reach.values())
        if mass is not None:
            factors[0] = factors[0] / mass.unsqueeze(-1)
        gram = functools.reduce(operator.mul, [factor @ factor.mT for factor in factors])
        inside = [f[..., m : m + k] for f, m, k in zip(factors, margins, wanted.shape[2:], strict=True)]
        return gram, _outer(inside) @ wanted.flatten(2).mT

    numbers = count * max(count, targets.shape[2:].numel(), *kernel_size)
    return fit_separately(equations, targets, start, dict.fromkeys(start, 1.0), numbers)


def _partly_dense_kernel(
    function: Callable[..., Tensor],
    settings: tuple[tuple[str, Any], ...],
    position_dims: Sequence[int],
    **inputs: Tensor,
) -> Tensor:
    """A kernel whose elements move along `position_dims` only: the dense dimensions act as more channels."""
    kernel = function(**inputs, **dict(settings))
    return kernel.movedim(tuple(range(-len(position_dims), 0)), tuple(2 + d for d in position_dims))


def _position_dims(dims: Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    if dims is None:
        return tuple(range(ndim))
    wrong = not isinstance(dims, Sequence) or any(as_int(dim) is None for dim in dims)
    if wrong or not dims or sorted(set(dims)) != list(dims) or dims[0] < 0 or dims[-1] >= ndim:
        raise ValueError(f"position_dims={dims!r}: expected ascending spatial dimensions out of 0..{ndim - 1}")
    return tuple(dims)
