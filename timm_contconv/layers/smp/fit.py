"""Points whose kernels approximate given kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..core.least_squares import Geometry, fit_separately, pixels_by_energy
from ..core.plain import centred, margin
from .formula import point_basis

__all__ = ["fit_points"]

# parts of the distance between pixels: a point needs an offset to have a gradient, and with this radius it reaches
# no other pixel
OFF_CENTRE, ALONE = 0.05, 0.9


def fit_points(
    targets: Tensor, kernel_size: Sequence[int], count: int, normalize: bool, radii: tuple[float, float]
) -> tuple[dict[str, Tensor], Tensor]:
    """Points common to n kernels, and weights for each, that approximate the kernels in least squares.

    Points start on the pixels with the most energy. If there are enough for all pixels that are not 0, each point
    reaches only its own pixel, which is exact.

    Args:
        targets: (P, n, *size); each of the P problems has points of its own.
        kernel_size: D ints, at least the targets' size, with the same centre.
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
        inside = centred(basis.unflatten(-1, tuple(kernel_size)), size).flatten(2)
        return basis @ basis.mT, inside @ wanted.flatten(2).mT

    numbers = count * max(count, math.prod(kernel_size))
    geometry, weight = fit_separately(equations, targets, start, dict.fromkeys(start, spacing), numbers)
    geometry["radius"].clamp_(*radii)
    return geometry, weight
