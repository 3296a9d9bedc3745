"""One crop for all kernels of a model, in compiled training."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .conv import FlexConv

__all__ = ["crop_alike_"]


def crop_alike_(layers: Iterable[nn.Module]) -> None:
    """Let compiled training use the same part of every kernel: the largest that a mask needs, rounded up to a quarter.

    A model is one graph, which is compiled again for every new combination of sizes. So there are at most four of them,
    however many layers there are. Eager training crops every kernel by itself.

    Args:
        layers: of one model; those that are no FlexConv, or whose margins are not known, stay as they are.
    """
    kernels = [layer.kernel for layer in layers if isinstance(layer, FlexConv)]
    parts = {kernel: part for kernel in kernels if (part := kernel.visible_part()) is not None}
    for kernel in parts:
        kernel.crop_compiled(max(parts.values()))
