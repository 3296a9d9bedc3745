"""Elements whose kernels approximate given kernels."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.least_squares import Geometry, fit_separately, pixels_by_energy
from ..core.plain import margin
from .formula import FACTORS, Interpolation, outer

__all__ = ["INITIAL_SIGMA", "fit_elements"]

INITIAL_SIGMA = {"triangle": 0.0, "gauss": 0.23}  # Appendix C
SMALLEST_START_SIGMA = 0.1  # a fit starts wider than 0: there an element on a pixel has no gradient


def fit_elements(
    targets: Tensor, kernel_size: Sequence[int], count: int, interpolation: Interpolation
) -> tuple[dict[str, Tensor], Tensor]:
    """Positions and widths common to n kernels, and weights for each, that approximate the kernels in least squares.

    Elements start on the pixels with the most energy. For "bilinear" with enough elements this is exact.

    Args:
        targets: (B, n, *size); each of the B problems has elements of its own.
        kernel_size: D ints, at least the targets' size, with the same centre.
        count: m elements.
        interpolation: as in `DclsSpec`.

    Returns:
        {"position": (B, m, D)}, for "triangle" and "gauss" also "sigma", and weights (B, m, n); float64 on the CPU.
    """
    targets = targets.detach().double().cpu()
    margins = [margin(old, new) for old, new in zip(targets.shape[2:], kernel_size, strict=True)]
    offset = targets.new_tensor([m - k // 2 for m, k in zip(margins, kernel_size, strict=True)])
    start = {"position": pixels_by_energy(targets, len(kernel_size), count) + offset}
    if interpolation in INITIAL_SIGMA:
        start["sigma"] = torch.full_like(start["position"], max(INITIAL_SIGMA[interpolation], SMALLEST_START_SIGMA))

    def equations(wanted: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        axes_first = {name: value.movedim(-1, 0) for name, value in geometry.items()}
        factors, mass = FACTORS[interpolation](**axes_first, kernel_size=kernel_size)
        if mass is not None:
            factors[0] = factors[0] / mass.unsqueeze(-1)
        gram = functools.reduce(operator.mul, [factor @ factor.mT for factor in factors])
        inside = [f[..., m : m + k] for f, m, k in zip(factors, margins, wanted.shape[2:], strict=True)]
        return gram, outer(inside) @ wanted.flatten(2).mT

    numbers = count * max(count, targets.shape[2:].numel(), *kernel_size)
    return fit_separately(equations, targets, start, dict.fromkeys(start, 1.0), numbers)
