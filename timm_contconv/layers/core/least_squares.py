"""Separable least squares: kernels that are linear in their weights and smooth in their geometry.

For a given geometry (positions, widths, radii) the best weights solve small linear systems, so only the geometry is
searched. At the best weights, the gradient of the error by the geometry is the one for constant weights (Golub and
Pereyra 1973, "The differentiation of pseudo-inverses and nonlinear least squares problems").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["Geometry", "NormalEquations", "fit_separately", "pixels_by_energy", "refine", "solve"]

Geometry = Mapping[str, Tensor]
#: geometry -> Gram matrices of the elements (B, m, m), and their products with the n targets (B, m, n)
NormalEquations = Callable[[Geometry], tuple[Tensor, Tensor]]

STEPS = 150
LARGEST_STEP = 0.15  # pixels
RIDGE = 1e-9  # relative to the mean of the Gram matrix's diagonal: two elements may be at the same place
LARGEST_TENSOR = 1 << 24  # numbers
CLOSE_ENOUGH = 1e-6  # relative error


def solve(gram: Tensor, products: Tensor) -> Tensor:
    """The weights that minimise the squared error.

    Args:
        gram: (B, m, m) inner products of the elements.
        products: (B, m, n) inner products of elements and targets.

    Returns:
        (B, m, n).
    """
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(products, torch.linalg.cholesky(gram + ridge[:, None, None] * identity))


def fit_separately(
    equations: Callable[[Tensor, Geometry], tuple[Tensor, Tensor]],
    targets: Tensor,
    start: Geometry,
    units: Mapping[str, float],
    numbers: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Geometry and weights of B separate problems, solved in parts that fit into memory.

    Args:
        equations: (targets of some problems, their geometry) -> their normal equations.
        targets: (B, n, ...).
        start: geometry to begin with, (B, m, ...) each.
        units: as in `refine`.
        numbers: size of the largest tensor of one problem.

    Returns:
        The geometry, (B, m, ...) each, and the weights, (B, m, n).
    """
    at_once = max(1, LARGEST_TENSOR // numbers)
    pieces = []
    with torch.inference_mode(False):
        for first in range(0, targets.shape[0], at_once):
            part = slice(first, first + at_once)
            wanted = targets[part].clone()
            own = functools.partial(equations, wanted)
            geometry = refine(own, {k: v[part] for k, v in start.items()}, wanted.square().sum().item(), units)
            pieces.append((geometry, solve(*own(geometry))))
    geometry = {name: torch.cat([g[name] for g, _ in pieces]) for name in start}
    return geometry, torch.cat([weight for _, weight in pieces])


def refine(equations: NormalEquations, start: Geometry, energy: float, units: Mapping[str, float]) -> Geometry:
    """Improve a geometry with Adam. Every step solves for the weights again.

    Args:
        equations: the normal equations at a geometry.
        start: where to begin, (B, ...) each.
        energy: sum of the squares of all targets.
        units: by name, the change of a value that corresponds to a pixel.

    Returns:
        The best geometry found, shaped like start.
    """
    variables = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam([{"params": [v], "lr": LARGEST_STEP * units[k]} for k, v in variables.items()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best = dict(start)
    least = variables[next(iter(variables))].new_tensor(torch.inf)
    for _ in range(STEPS + 1):
        with torch.enable_grad():
            gram, products = equations(variables)
            weights = solve(gram.detach(), products.detach())
            losses = (gram @ weights - 2 * products).mul(weights).sum((-2, -1))  # error less energy, by problem
            loss = losses.sum()
        better = losses.detach() < least
        least = torch.where(better, losses.detach(), least)
        for name, value in variables.items():
            best[name] = torch.where(better.view(-1, *(1,) * (value.ndim - 1)), value.detach(), best[name])
        if energy + least.sum().item() <= CLOSE_ENOUGH**2 * energy:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return best


def pixels_by_energy(targets: Tensor, ndim: int, count: int) -> Tensor:
    """Pixels where elements start: those with the most energy in the targets, then the nearest to the centre.

    Args:
        targets: (B, n, *size), size of ndim dimensions.
        ndim: number of spatial dimensions.
        count: m; if there are fewer pixels, they repeat.

    Returns:
        (B, m, ndim) pixel indices.
    """
    size = targets.shape[-ndim:]
    energy = targets.square().sum(1).flatten(1)
    device = energy.device
    axes = torch.meshgrid(*(torch.arange(k, dtype=energy.dtype, device=device) for k in size), indexing="ij")
    pixels = torch.stack(axes, -1).flatten(0, -2)
    from_centre = (pixels - (energy.new_tensor(size) - 1) / 2).square().sum(-1)
    rank = energy / energy.amax(1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    order = (rank - 1e-12 * from_centre).argsort(dim=1, descending=True, stable=True)
    return pixels.to(energy)[order[:, torch.arange(count, device=device) % order.shape[1]]]
