"""Blocks that fold their branches into one convolution for inference: which of their convolutions may be replaced.

timm's `reparameterize_model` calls methods of the model's own blocks. They read kernels, sizes and paddings off
convolutions, and some take a size for granted. So a copy of the block is tried with the new layers in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from timm.utils import reparameterize_model
from torch import nn

from ..layers import ConvReplacement
from .swap import swap

__all__ = ["blocks_that_fold", "folding_obstacle"]

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
TOLERANCE = 1e-4  # relative, in float32: the blocks make their folded convolutions in the default dtype
PIXELS = 32


def blocks_that_fold(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The outermost module that re-parameterises itself around each named module, with the names inside of it."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        path = name.split(".")[:-1]
        for depth in range(1, len(path) + 1):
            block = ".".join(path[:depth])
            if any(callable(getattr(model.get_submodule(block), method, None)) for method in METHODS):
                blocks.setdefault(block, []).append(name)
                break
    return blocks


def folding_obstacle(block: nn.Module, layers: Mapping[str, ConvReplacement]) -> str | None:
    """Why a block could no longer re-parameterise itself with these layers, or None where it can.

    Args:
        block: it is not changed.
        layers: what would stand in it, by name within it.
    """
    trial = copy.deepcopy(block).to("cpu", torch.float32)
    swap(trial, {name: copy.deepcopy(layer).to("cpu", torch.float32) for name, layer in layers.items()})
    generator = torch.Generator().manual_seed(0)
    _stir(trial, generator)
    whole = nn.Sequential(trial).eval()
    channels = next(module.in_channels for module in block.modules() if isinstance(module, nn.Conv2d))
    images = torch.randn(2, channels, PIXELS, PIXELS, generator=generator)
    kind = type(block).__name__
    with torch.no_grad():
        try:
            expected = whole(images)
            folded = reparameterize_model(whole)(images)
            error = torch.linalg.vector_norm(folded - expected) / torch.linalg.vector_norm(expected)
        except Exception as failure:  # whatever a stranger's block makes of it
            return f"its {kind} could no longer re-parameterise itself ({type(failure).__name__})"
    return None if error < TOLERANCE else f"its {kind} would re-parameterise itself to another output"


@torch.no_grad()
def _stir(block: nn.Module, generator: torch.Generator) -> None:
    """Change parameters and running statistics, so that nothing is hidden behind a 0 or a 1."""
    for parameter in block.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.add_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.add_(torch.rand(module.running_var.shape, generator=generator))
