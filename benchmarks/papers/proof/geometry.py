"""Where a network's elements, points, masks and envelopes lie, in pixels, and what its last map looks at."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from timm_contconv.inspect.receptive_field import SHARES, effective_receptive_field
from timm_contconv.layers import ConvReplacement

__all__ = ["described_change", "quantities", "receptive_field"]

Quantities = dict[str, dict[str, Tensor]]


def quantities(model: nn.Module) -> Quantities:
    """By layer, in the network's order, and by name: (N, D) numbers or vectors in pixels. Layers may have none.

    They are what reports show: distances of DCLS' elements and SMP's points from the centre, widths, radii, sizes of
    masks, σ of envelopes.
    """
    found: Quantities = {}
    for name, module in model.named_modules():
        if isinstance(module, ConvReplacement) and name.rpartition(".")[0] not in found:
            shown = {quantity.name: quantity.values.detach().clone() for quantity in module.shown_quantities()}
            found |= {name: shown} if shown else {}
    return found


def described_change(before: Quantities, after: Quantities) -> dict[str, dict[str, dict[str, float]]]:
    """By layer and quantity: mean and deviation of the lengths before and after, and how far they moved."""
    return {
        layer: {name: _change(name, values, after[layer][name]) for name, values in shown.items()}
        for layer, shown in before.items()
    }


def _change(name: str, before: Tensor, after: Tensor) -> dict[str, float]:
    """`moved` is the root mean square length of after - before."""
    record = {"moved": (after - before).square().sum(1).mean().sqrt().item()}
    for when, values in (("before", before), ("after", after)):
        # rows and columns of a mask are two sizes, and no vector
        lengths = values.mean(1) if name.startswith("size") else values.norm(dim=1)
        record |= {f"mean {when}": lengths.mean().item(), f"deviation {when}": lengths.std(correction=0).item()}
    return record


def receptive_field(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Side of the central square that holds a share of the contributions, and their spread, in pixels.

    Contributions are to the centre of the last feature map (Luo et al. 2016). The spread is the root mean square
    distance from their centre of mass: the last map's central pixel need not lie over the picture's.
    """
    field = effective_receptive_field(copy.deepcopy(model).eval().requires_grad_(False), images)
    variance = 0.0
    for axis, side in enumerate(field.contributions.shape):
        marginal, position = field.contributions.sum(1 - axis), torch.arange(side)
        mean = (marginal * position).sum()
        variance += (marginal * (position - mean) ** 2).sum().item()
    return {**{f"{share:.0%}": float(field.square(share)) for share in SHARES}, "spread": math.sqrt(variance)}
