"""The dense DCLS kernel as a function of its parameters (Khalfaoui-Hassani et al. 2023)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...ops import plain_only
from ..core.subnormals import bell, bell_

__all__ = [
    "FACTORS",
    "Factors",
    "Interpolation",
    "bilinear_kernel",
    "dcls_kernel",
    "gauss_kernel",
    "outer",
    "repulsion",
    "triangle_kernel",
]

Interpolation = Literal["bilinear", "normalized_bilinear", "triangle", "gauss"]
#: factors (..., m, K_d) along every axis, and the normalisation (..., m) of Eq. 11, or None
Factors = tuple[list[Tensor], Tensor | None]

TRIANGLE_MIN_WIDTH = 1.0  # sigma_0 of Eq. 9
GAUSS_MIN_WIDTH = 0.27  # sigma_0 of Eq. 10
NORMALIZATION_EPS = 1e-7  # epsilon of Eq. 11


def dcls_kernel(
    weight: Tensor,
    interpolation: Interpolation,
    kernel_size: Sequence[int],
    position_dims: Sequence[int] | None = None,
    **geometry: Tensor,
) -> Tensor:
    """Dense DCLS kernel (Khalfaoui-Hassani et al. 2023, Algorithm 1).

    Args:
        weight: (C_out, C_in/groups, *dense sizes, m) element weights.
        interpolation: as in `DclsSpec`.
        kernel_size: sizes of the kernel along the D dimensions in which elements move.
        position_dims: these dimensions; None for all. The others are treated as channels.
        **geometry: `position` and, for "triangle" and "gauss", `sigma`: (D, *weight.shape), in pixels.

    Returns:
        (C_out, C_in/groups, *size), the size along all dimensions.
    """
    factors, mass = FACTORS[interpolation](**geometry, kernel_size=kernel_size)
    *leading, last = factors
    rows = outer([(weight if mass is None else weight / mass).unsqueeze(-1), *leading])
    kernel = torch.bmm(rows.flatten(0, -3).transpose(1, 2), last.flatten(0, -3))
    kernel = kernel.view(*weight.shape[:-1], *kernel_size)
    if position_dims is None:
        return kernel
    return kernel.movedim(tuple(range(-len(position_dims), 0)), tuple(2 + d for d in position_dims))


def bilinear_kernel(weight: Tensor, position: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense DCLS kernel with bilinear interpolation (Khalfaoui-Hassani et al. 2023, Eq. 2, 4 and 12).

    Args:
        weight: (C_out, C_in/groups, m) element weights.
        position: (D, C_out, C_in/groups, m) element positions, in pixels from the kernel centre K // 2.
        kernel_size: D ints.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel. Parts of elements outside the kernel are cut off.
    """
    return dcls_kernel(weight, "bilinear", kernel_size, position=position)


def triangle_kernel(weight: Tensor, position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense DCLS kernel with triangle interpolation (Khalfaoui-Hassani et al. 2023, Eq. 9 and 11).

    Args:
        weight, position, kernel_size: as for `bilinear_kernel`.
        sigma: like position; an element reaches 1 + |sigma| pixels to either side.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel; every element is normalised to a sum of 1 over the kernel.
    """
    return dcls_kernel(weight, "triangle", kernel_size, position=position, sigma=sigma)


def gauss_kernel(weight: Tensor, position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense DCLS kernel with Gaussian interpolation (Khalfaoui-Hassani et al. 2023, Eq. 10 and 11).

    Args:
        weight, position, kernel_size: as for `bilinear_kernel`.
        sigma: like position; the effective width is 0.27 + |sigma| pixels.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel; every element is normalised to a sum of 1 over the kernel.
    """
    return dcls_kernel(weight, "gauss", kernel_size, position=position, sigma=sigma)


def repulsion(position: Tensor) -> Tensor:
    """How close the elements of a kernel are to each other, 0 to 1 (released ConvNeXt-dcls training code).

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
    """Influence of every element on every pixel along every axis."""
    return [_hat(_distance(position[d], size)) for d, size in enumerate(kernel_size)], None


def normalized_bilinear_factors(position: Tensor, kernel_size: Sequence[int]) -> Factors:
    """As `bilinear_factors`, normalised: version "v1" of the authors' package."""
    factors, _ = bilinear_factors(position, kernel_size)
    return factors, _mass([factor.sum(-1) for factor in factors])


def triangle_factors(position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Factors:
    widths = TRIANGLE_MIN_WIDTH + sigma.abs()
    factors = [
        (widths[d].unsqueeze(-1) - _distance(position[d], size).abs()).relu() for d, size in enumerate(kernel_size)
    ]
    return factors, _mass([factor.sum(-1) for factor in factors])


def gauss_factors(position: Tensor, sigma: Tensor, kernel_size: Sequence[int]) -> Factors:
    widths = GAUSS_MIN_WIDTH + sigma.abs()
    bells = _bells if plain_only() else _Bells.apply
    pairs = [bells(position[d], widths[d], size) for d, size in enumerate(kernel_size)]
    return [factor for factor, _ in pairs], _mass([total for _, total in pairs])


def _distance(position: Tensor, size: int) -> Tensor:
    """Signed distance from every element (..., m) to every pixel of an axis of `size` pixels: (..., m, size)."""
    pixels = torch.arange(size, device=position.device, dtype=position.dtype) - size // 2
    return pixels - position.unsqueeze(-1)


def _hat(distance: Tensor) -> Tensor:
    """max(0, 1 - |distance|) with the right-hand derivative by the position at its kinks.

    PyTorch's derivatives of abs() and relu() are 0 there, so an element on a whole pixel would never move. NaN stays
    NaN, so that errors are seen.
    """
    hat = torch.where(distance > 0, 1 - distance, 1 + distance)
    return torch.where((distance <= -1) | (distance > 1), 0, hat)


def _bells(position: Tensor, width: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """exp(-(distance / width)^2 / 2), negligible values set to 0, and the sums over the axis.

    Args:
        position, width: (..., m).
        size: of the axis.

    Returns:
        (..., m, size) and (..., m).
    """
    factors = bell(-0.5 * (_distance(position, size) / width.unsqueeze(-1)).square())
    return factors, factors.sum(-1)


class _Bells(torch.autograd.Function):
    """`_bells` with a gradient that passes over memory a third as often as autograd's.

    With g = exp(-t^2 / 2), t = distance / width: dg/dposition = g t / width and dg/dwidth = g t^2 / width. `backward`
    uses differentiable operators, so derivatives of any order are right.
    """

    @staticmethod
    def forward(position: Tensor, width: Tensor, size: int) -> tuple[Tensor, Tensor]:
        factors = bell_(_distance(position, size).div_(width.unsqueeze(-1)).square_().mul_(-0.5))
        return factors, factors.sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        position, width, _ = inputs
        ctx.save_for_backward(position, width, output[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        position, width, factors = ctx.saved_tensors
        t = _distance(position, factors.shape[-1]).div_(width.unsqueeze(-1))
        once = (grad + grad_total.unsqueeze(-1)).mul_(factors).mul_(t)
        grad_position = once.sum(-1) / width if ctx.needs_input_grad[0] else None
        grad_width = once.mul_(t).sum(-1) / width if ctx.needs_input_grad[1] else None
        return grad_position, grad_width, None


def _mass(totals: Sequence[Tensor]) -> Tensor:
    """Normalisation of Eq. 11, from every element's sum along each axis.

    The sum over the kernel of a product over axes is the product of the sums.
    """
    return NORMALIZATION_EPS + functools.reduce(operator.mul, totals)


def outer(factors: Sequence[Tensor]) -> Tensor:
    """Outer products over the last axes, flattened: (..., K_1), ..., (..., K_D) to (..., K_1 * ... * K_D)."""
    return functools.reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), factors)


FACTORS: dict[str, Callable[..., Factors]] = {
    "bilinear": bilinear_factors,
    "normalized_bilinear": normalized_bilinear_factors,
    "triangle": triangle_factors,
    "gauss": gauss_factors,
}
