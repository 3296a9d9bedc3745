"""Elements whose kernels approximate given kernels."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.least_squares import Geometry, fit_separately, pixels_by_energy, pixels_needed
from ..core.plain import margin
from .formula import FACTORS, GAUSS_MIN_WIDTH, Interpolation, outer

__all__ = ["INITIAL_SIGMA", "element_kernels", "elements_needed", "fit_elements"]

INITIAL_SIGMA = {"triangle": 0.0, "gauss": 0.23}  # Appendix C
SMALLEST_START_SIGMA = 0.1  # a search starts wider than 0: there an element on a pixel has no gradient
SMALLEST_SIGMA = 0.003  # of an element that should reach its own pixel only: its width still has a gradient
# parts of the tolerance: for pixels without an element, and for what an element spreads to each neighbouring pixel
LEFT_OUT, SPREAD = 0.5, 0.15


def elements_needed(targets: Tensor, interpolation: Interpolation, tolerance: float) -> int:
    """The fewest elements on pixels that approximate kernels to a relative error of `tolerance`.

    Args:
        targets: (B, n, *size), as for `fit_elements`.
        interpolation: "bilinear" elements reach only their own pixel; for the others a part of the tolerance is kept.
        tolerance: of the norm of each of the n kernels over all problems.
    """
    return pixels_needed(targets, tolerance if interpolation == "bilinear" else LEFT_OUT * tolerance)


def fit_elements(
    targets: Tensor, kernel_size: Sequence[int], count: int, interpolation: Interpolation, tolerance: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Positions and widths common to n kernels, and weights for each, that approximate the kernels in least squares.

    Elements start on the pixels with the most energy. If they can stay there, within the tolerance, only weights are
    solved for; with "bilinear" and an element per pixel this is exact.

    Args:
        targets: (B, n, *size); each of the B problems has elements of its own.
        kernel_size: D ints, at least the targets' size, with the same centre.
        count: m elements.
        interpolation: as in `DclsSpec`.
        tolerance: relative error of each of the n kernels that is good enough.

    Returns:
        {"position": (B, m, D)}, for "triangle" and "gauss" also "sigma", and weights (B, m, n); float64 on the CPU.
    """
    targets = targets.detach().double().cpu()
    margins = [margin(old, new) for old, new in zip(targets.shape[2:], kernel_size, strict=True)]
    position = pixels_by_energy(targets, kernel_size, count) - targets.new_tensor([k // 2 for k in kernel_size])
    on_pixels, start = {"position": position}, {"position": position}
    if interpolation in INITIAL_SIGMA:
        on_pixels["sigma"] = torch.full_like(position, _narrow_sigma(interpolation, tolerance))
        start["sigma"] = torch.full_like(position, max(INITIAL_SIGMA[interpolation], SMALLEST_START_SIGMA))

    def equations(wanted: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        axes_first = {name: value.movedim(-1, 0) for name, value in geometry.items()}
        factors, mass = FACTORS[interpolation](**axes_first, kernel_size=kernel_size)
        if mass is not None:
            factors[0] = factors[0] / mass.unsqueeze(-1)
        gram = functools.reduce(operator.mul, [factor @ factor.mT for factor in factors])
        inside = [f[..., m : m + k] for f, m, k in zip(factors, margins, wanted.shape[2:], strict=True)]
        return gram, outer(inside) @ wanted.flatten(2).mT

    numbers = count * max(count, targets.shape[2:].numel(), *kernel_size)
    units = dict.fromkeys(start, 1.0)
    return fit_separately(equations, targets, on_pixels, start, units, numbers, tolerance)


def element_kernels(
    geometry: Geometry, kernel_size: Sequence[int], interpolation: Interpolation, window: Sequence[tuple[int, int]]
) -> Tensor:
    """See `DclsKernel.element_kernels`."""
    axes_first = {name: value.movedim(-1, 0) for name, value in geometry.items()}
    factors, mass = FACTORS[interpolation](**axes_first, kernel_size=kernel_size)
    kernels = outer([factor[..., first:last] for factor, (first, last) in zip(factors, window, strict=True)])
    return kernels if mass is None else kernels / mass.unsqueeze(-1)


def _narrow_sigma(interpolation: Interpolation, tolerance: float) -> float:
    """The width with which an element on a pixel spreads a part SPREAD * tolerance to each neighbour along an axis."""
    spread = min(max(SPREAD * tolerance, 1e-6), 0.1)
    if interpolation == "gauss":
        return max(1 / math.sqrt(-2 * math.log(spread)) - GAUSS_MIN_WIDTH, SMALLEST_SIGMA)
    return max(spread / (1 - spread), SMALLEST_SIGMA)
