"""Points whose kernels approximate given kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.least_squares import Geometry, fit_separately, pixels_by_energy
from ..core.plain import centred, margin
from .formula import point_basis

__all__ = ["fit_points"]

# parts of the distance between pixels: a point needs an offset to have a gradient, and with this radius it reaches
# no other pixel
OFF_CENTRE, ALONE = 0.05, 0.9
WIDE = 1.5  # radius at the start of a search, in pixels


def fit_points(
    targets: Tensor,
    kernel_size: Sequence[int],
    count: int,
    normalize: bool,
    radii: tuple[float, float],
    tolerance: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """Points common to n kernels, and weights for each, that approximate the kernels in least squares.

    Points start on the pixels with the most energy. If there is one for every pixel that is not 0, and points may be
    so small that each reaches only its own pixel, they stay there, which is exact. Spare points lie around these.

    Args:
        targets: (P, n, *size); each of the P problems has points of its own.
        kernel_size: D ints, at least the targets' size, with the same centre.
        count: m points.
        normalize: as in the layer.
        radii: smallest and largest radius.
        tolerance: relative error of each of the n kernels that is good enough.

    Returns:
        {"coordinate": (P, m, D), "radius": (P, m)} and weights (P, m, n), all float64 on the CPU.
    """
    targets = targets.detach().double().cpu()
    size = targets.shape[2:]
    last = targets.new_tensor([max(k - 1, 1) for k in kernel_size])
    pixels = pixels_by_energy(targets, kernel_size, count)
    spacing = 2 / last.max().item()
    coordinate = (2 * pixels - targets.new_tensor(kernel_size) + 1) / last + OFF_CENTRE * spacing
    alone = {"coordinate": coordinate, "radius": _radius(pixels, ALONE * spacing, radii)}
    used = int((targets != 0).any(1).flatten(1).sum(1).max())
    if used <= count <= math.prod(kernel_size) and radii[0] <= ALONE * spacing:
        height = 1 - len(size) * OFF_CENTRE * spacing / alone["radius"][0, 0].item()
        return alone, _values_at(targets, kernel_size, pixels) / height
    start = {"coordinate": coordinate, "radius": _radius(pixels, WIDE * spacing, radii)}

    def equations(wanted: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        basis = point_basis(geometry["coordinate"], geometry["radius"].clamp(*radii), kernel_size)
        if normalize:
            basis = basis / (basis > 0).sum(1, keepdim=True).clamp(min=1)
        inside = centred(basis.unflatten(-1, tuple(kernel_size)), size).flatten(2)
        return basis @ basis.mT, inside @ wanted.flatten(2).mT

    numbers = count * max(count, math.prod(kernel_size))
    geometry, weight = fit_separately(
        equations, targets, alone, start, dict.fromkeys(start, spacing), numbers, tolerance
    )
    geometry["radius"].clamp_(*radii)
    return geometry, weight


def _radius(pixels: Tensor, radius: float, radii: tuple[float, float]) -> Tensor:
    return pixels.new_full(pixels.shape[:2], min(max(radius, radii[0]), radii[1]))


def _values_at(targets: Tensor, kernel_size: Sequence[int], pixels: Tensor) -> Tensor:
    """(P, m, n): the targets' values at pixels, 0 outside of them.

    Args:
        targets: (P, n, *size).
        kernel_size: D ints.
        pixels: (P, m, D) indices of the kernel's pixels.
    """
    size = targets.shape[2:]
    margins = pixels.new_tensor([margin(old, new) for old, new in zip(size, kernel_size, strict=True)])
    own = (pixels - margins).long()
    inside = ((own >= 0) & (own < own.new_tensor(size))).all(-1)
    steps = own.new_tensor([math.prod(size[d + 1 :]) for d in range(len(size))])
    index = torch.where(inside, (own * steps).sum(-1), 0)
    values = targets.flatten(2).gather(2, index.unsqueeze(1).expand(-1, targets.shape[1], -1))
    return (values * inside.unsqueeze(1)).mT
