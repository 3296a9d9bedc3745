"""Padding of images before a convolution, for paddings that the convolution can't do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

__all__ = ["pad_image", "same_sides", "sides_of"]


def sides_of(
    padding: Sequence[int] | str, kernel_size: Sequence[int], stride: Sequence[int], size: Sequence[int]
) -> list[tuple[int, int]]:
    """Pixels before and after an image of `size`, per spatial dimension, that a padding stands for.

    Args:
        padding: one int per dimension, "same" (the output has ceil(size / stride) pixels) or "causal" (all before the
            first sample).
        kernel_size, stride, size: one int per dimension.
    """
    if padding == "causal":
        return [(k - 1, 0) for k in kernel_size]
    if padding == "same":
        return [same_sides(*d) for d in zip(size, kernel_size, stride, strict=True)]
    return [(int(p), int(p)) for p in padding]


def same_sides(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Pixels before and after a dimension of an image, so that the output has ceil(size / stride) pixels."""
    if stride == 1:
        return (kernel_size - 1) // 2, kernel_size // 2
    total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def pad_image(x: Tensor, sides: Sequence[tuple[int, int]], padding_mode: str) -> Tensor:
    """Add pixels before and after each spatial dimension of x, (..., *size); negative numbers cut pixels off.

    Args:
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """
    amounts = [max(amount, 0) for side in reversed(sides) for amount in side]
    if any(amounts):
        x = F.pad(x, amounts, mode="constant" if padding_mode == "zeros" else padding_mode)
    for dim, (before, after) in enumerate(sides, start=-len(sides)):
        if min(before, after) < 0:
            first = max(-before, 0)
            x = x.narrow(dim, first, x.shape[dim] - first - max(-after, 0))
    return x
