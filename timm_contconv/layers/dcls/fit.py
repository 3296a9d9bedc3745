"""Elements whose kernels approximate given kernels."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.least_squares import Geometry, fit_separately, pixels_by_energy
from ..core.plain import margin
from .formula import FACTORS, GAUSS_MIN_WIDTH, Interpolation, outer

__all__ = ["INITIAL_SIGMA", "LEFT_OUT", "fit_elements"]

INITIAL_SIGMA = {"triangle": 0.0, "gauss": 0.23}  # Appendix C
SMALLEST_START_SIGMA = 0.1  # a search starts wider than 0: there an element on a pixel has no gradient
# of an element that should reach its own pixel only: its width still has a gradient
SMALLEST_SIGMA = {"triangle": 0.0003, "gauss": 0.003}
# part of the tolerance for pixels without an element: few are that small, and without them a network's outputs change
# more than its kernels
LEFT_OUT = 0.1
SPREAD = 0.03  # part of the tolerance for what an element spreads to each neighbouring pixel
REACH = 3  # pixels around the old kernel that a search looks at
# of neighbouring pixels in feature maps; of 0, 0.5, 0.8 and 0.95 it changes a network's outputs least
CORRELATION = 0.8


def fit_elements(
    targets: Tensor, kernel_size: Sequence[int], count: int, interpolation: Interpolation, tolerance: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Positions and widths common to n kernels, and weights for each, that approximate the kernels in least squares.

    The error is what the outputs of a convolution lose: E||(new - old) * x||^2 for images x with a correlation of
    CORRELATION^distance along each axis. That keeps low frequencies, and with them what a network says, much better
    than the plain ||new - old||.

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
    position = pixels_by_energy(targets, kernel_size, count) - targets.new_tensor([k // 2 for k in kernel_size])
    on_pixels, start = {"position": position}, {"position": position}
    if interpolation in INITIAL_SIGMA:
        on_pixels["sigma"] = torch.full_like(position, _narrow_sigma(interpolation, tolerance))
        start["sigma"] = torch.full_like(position, max(INITIAL_SIGMA[interpolation], SMALLEST_START_SIGMA))

    def equations(
        wanted: Tensor, geometry: Geometry, size: Sequence[int], correlation: float = CORRELATION
    ) -> tuple[Tensor, Tensor]:
        axes_first = {name: value.movedim(-1, 0) for name, value in geometry.items()}
        factors, mass = FACTORS[interpolation](**axes_first, kernel_size=size)
        if mass is not None:
            factors[0] = factors[0] / mass.unsqueeze(-1)
        seen = [factor @ _correlations(factor, correlation) for factor in factors] if correlation else factors
        gram = functools.reduce(operator.mul, [a @ b.mT for a, b in zip(seen, factors, strict=True)])
        first = [margin(old, new) for old, new in zip(wanted.shape[2:], size, strict=True)]
        inside = [f[..., m : m + k] for f, m, k in zip(seen, first, wanted.shape[2:], strict=True)]
        return gram, outer(inside) @ wanted.flatten(2).mT

    near = [k - 2 * max(margin(old + 2 * REACH, k), 0) for old, k in zip(targets.shape[2:], kernel_size, strict=True)]
    weighed, search = (functools.partial(equations, size=size) for size in (kernel_size, near))
    plain = functools.partial(weighed, correlation=0.0)
    numbers = count * max(count, targets.shape[2:].numel(), *kernel_size)
    units = dict.fromkeys(start, 1.0)
    return fit_separately(weighed, targets, on_pixels, start, units, numbers, tolerance, plain, search)


def _correlations(factor: Tensor, correlation: float) -> Tensor:
    """(K, K) between the pixels of an axis, for factors (..., K)."""
    pixels = torch.arange(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return correlation ** (pixels[:, None] - pixels).abs()


def _narrow_sigma(interpolation: Interpolation, tolerance: float) -> float:
    """The width with which an element on a pixel spreads a part SPREAD * tolerance to each neighbour along an axis."""
    spread = min(max(SPREAD * tolerance, 1e-6), 0.1)
    if interpolation == "gauss":
        return max(1 / math.sqrt(-2 * math.log(spread)) - GAUSS_MIN_WIDTH, SMALLEST_SIGMA["gauss"])
    return max(spread / (1 - spread), SMALLEST_SIGMA["triangle"])
