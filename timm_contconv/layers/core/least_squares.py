"""Separable least squares: kernels that are linear in their weights and smooth in their geometry.

For a given geometry (positions, widths, radii) the best weights solve small linear systems, so only the geometry is
searched. At the best weights, the gradient of the error by the geometry is the one for constant weights (Golub and
Pereyra 1973, "The differentiation of pseudo-inverses and nonlinear least squares problems").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .plain import margin

__all__ = ["Geometry", "NormalEquations", "fit_separately", "pixels_by_energy", "pixels_needed", "solve"]

Geometry = Mapping[str, Tensor]
#: (targets (B, n, ...), geometry) -> Gram matrices of the elements (B, m, m), and their products with the targets
#: (B, m, n); more dimensions after B are more problems with the same geometry
NormalEquations = Callable[[Tensor, Geometry], tuple[Tensor, Tensor]]

STEPS = 60
LARGEST_STEP = 0.15  # pixels
RIDGE = 1e-9  # relative to the mean of the Gram matrix's diagonal: two elements may be at the same place
LARGEST_TENSOR = 1 << 24  # numbers


def solve(gram: Tensor, products: Tensor) -> Tensor:
    """The weights that minimise the squared error.

    Args:
        gram: (..., m, m) inner products of the elements.
        products: (..., m, n) inner products of elements and targets.

    Returns:
        (..., m, n).
    """
    ridge = max(RIDGE, 64 * torch.finfo(gram.dtype).eps) * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(
        torch.finfo(gram.dtype).tiny
    )
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(products, torch.linalg.cholesky(gram + ridge[..., None, None] * identity))


def fit_separately(
    equations: NormalEquations,
    targets: Tensor,
    on_pixels: Geometry,
    start: Geometry,
    units: Mapping[str, float],
    numbers: int,
    tolerance: float,
    plain: NormalEquations | None = None,
    search: NormalEquations | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Geometry and weights of B separate problems, solved in parts that fit into memory.

    If the weights at `on_pixels` reach the tolerance, nothing is searched. Otherwise the search begins at `start`, in
    float32, which is twice as fast.

    Args:
        equations: the normal equations of some of the problems.
        targets: (B, n, ...), float64.
        on_pixels: geometry with elements that hardly reach beyond their own pixels, (B, m, ...) each.
        start: geometry to begin the search with, (B, m, ...) each.
        units: by name, the change of a value that corresponds to a pixel.
        numbers: size of the largest tensor of one problem.
        tolerance: relative error that each of the n targets, over all problems of a part, may have.
        plain: normal equations of the plain squared error, which the tolerance is about, if `equations` weigh errors.
        search: normal equations that are cheaper and nearly the same, for the search.

    Returns:
        The geometry, (B, m, ...) each, and the weights, (B, m, n).
    """
    at_once = max(1, LARGEST_TENSOR // numbers)
    pieces = []
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the default is; Adam makes a tensor of its own
        for first in range(0, targets.shape[0], at_once):
            part = slice(first, first + at_once)
            wanted = targets[part].clone()
            geometry = {k: v[part] for k, v in on_pixels.items()}
            weights = solve(*equations(wanted, geometry))
            energy = wanted.square().transpose(0, 1).flatten(1).sum(1)
            left = energy + _loss(*(plain or equations)(wanted, geometry), weights).sum((0, 1))
            if (left > tolerance**2 * energy).any():
                begin = {k: v[part].float() for k, v in start.items()}
                found = _refined(search or equations, wanted.float(), begin, units)
                geometry = {k: v.double() for k, v in found.items()}
                weights = solve(*equations(wanted, geometry))
            pieces.append((geometry, weights))
    geometry = {name: torch.cat([g[name] for g, _ in pieces]) for name in start}
    return geometry, torch.cat([weight for _, weight in pieces])


def _refined(equations: NormalEquations, targets: Tensor, start: Geometry, units: Mapping[str, float]) -> Geometry:
    """The best geometry that Adam finds from start, (B, ...) each. Every step solves for the weights again."""
    variables = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam([{"params": [v], "lr": LARGEST_STEP * units[k]} for k, v in variables.items()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best = dict(start)
    least = variables[next(iter(variables))].new_tensor(torch.inf)
    for _ in range(STEPS + 1):
        with torch.enable_grad():
            gram, products = equations(targets, variables)
            weights = solve(gram.detach(), products.detach())
            losses = _loss(gram, products, weights).flatten(1).sum(1)
            loss = losses.sum()
        better = losses.detach() < least
        least = torch.where(better, losses.detach(), least)
        for name, value in variables.items():
            best[name] = torch.where(better.view(-1, *(1,) * (value.ndim - 1)), value.detach(), best[name])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return best


def _loss(gram: Tensor, products: Tensor, weights: Tensor) -> Tensor:
    """(B, m, n), whose sum over m is the squared error of each target less its energy."""
    return (gram @ weights - 2 * products).mul(weights)


def pixels_needed(targets: Tensor, tolerance: float) -> int:
    """The fewest pixels of every problem without which no target misses more than a part `tolerance` of its norm.

    Args:
        targets: (B, n, *size).
        tolerance: of the norm of a target over all problems.
    """
    energy = targets.square().flatten(2)
    energy = energy / energy.sum((0, 2), keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    order = energy.sum(1, keepdim=True).argsort(2, descending=True).expand_as(energy)
    missed = energy.gather(2, order).flip(2).cumsum(2).flip(2).sum(0)  # (n, P): without all from the p-th on
    return max(1, int((missed > tolerance**2).sum(1).max()))


def pixels_by_energy(targets: Tensor, kernel_size: Sequence[int], count: int) -> Tensor:
    """Pixels where elements start: those with the most energy in the targets, then the nearest to the centre.

    Args:
        targets: (B, n, *size).
        kernel_size: D ints, at least the targets' size, with the same centre.
        count: m. Pixels beyond those of the targets are the nearest ones around them; if there are fewer in the whole
            kernel, they repeat.

    Returns:
        (B, m, D) indices of the kernel's pixels.
    """
    size = targets.shape[2:]
    margins = targets.new_tensor([margin(old, new) for old, new in zip(size, kernel_size, strict=True)])
    energy = targets.square().sum(1).flatten(1)
    pixels = _pixels(size, targets)
    rank = energy / energy.amax(1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    order = (rank - 1e-12 * _from_centre(pixels, size)).argsort(dim=1, descending=True, stable=True)
    chosen = pixels[order[:, :count]] + margins
    if count > len(pixels):
        around = _pixels(kernel_size, targets) - margins
        outside = ((around < 0) | (around >= targets.new_tensor(size))).any(-1)
        around = around[outside]
        around = around[_from_centre(around, size).argsort(stable=True)] + margins
        chosen = torch.cat((chosen, around.expand(len(chosen), -1, -1)), 1)
    return chosen[:, torch.arange(count, device=chosen.device) % chosen.shape[1]]


def _pixels(size: Sequence[int], like: Tensor) -> Tensor:
    """(P, D): the indices of all pixels."""
    axes = torch.meshgrid(*(torch.arange(k, dtype=like.dtype, device=like.device) for k in size), indexing="ij")
    return torch.stack(axes, -1).flatten(0, -2)


def _from_centre(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Squared distances from the centre of an image of `size` pixels."""
    return (pixels - (pixels.new_tensor(size) - 1) / 2).square().sum(-1)
