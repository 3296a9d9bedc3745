"""The pixels of a kernel that is a function over [-1, 1], at its original resolution and at others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ...ops import compute_dtype

__all__ = ["KernelAxis", "resampled_padding", "sampled_axis"]


@dataclass(frozen=True)
class KernelAxis:
    """Pixels along one dimension of a kernel.

    Attributes:
        size: number of pixels.
        extent: steps from pixel to pixel between -1 and 1; 0 for a function of a single pixel, at 0.
        centre: index of the pixel at 0; it may lie between two pixels.
    """

    size: int
    extent: float
    centre: float

    @property
    def half(self) -> float:
        """Steps from 0 to 1."""
        return (self.extent or 1) / 2

    def positions(self, first: int, end: int, like: Tensor) -> Tensor:
        """Coordinates of the pixels first..end-1, (end - first,), in the precision of construction."""
        pixels = torch.arange(first, end, device=like.device, dtype=compute_dtype(like.dtype))
        return (pixels - self.centre) / self.half


def sampled_axis(size: int, ratio: Fraction, causal: bool) -> KernelAxis:
    """The axis of a kernel of `size` pixels at `ratio` times the resolution.

    Steps are divided by `ratio`, exactly. They count from the centre, or from the last pixel of a causal kernel, which
    is the newest sample. The number of pixels is the one that covers [-1, 1] best. A kernel with a centre and an even
    number of pixels keeps an even number, as long as two pixels are left.
    """
    extent = (size - 1) * ratio
    if causal:
        steps = _nearest(extent)
        return KernelAxis(steps + 1, float(extent), float(steps - extent / 2))
    odd = (size - 1) % 2 if extent >= 1 else 0
    steps = 2 * _nearest((extent - odd) / 2) + odd
    return KernelAxis(steps + 1, float(extent), steps / 2)


def resampled_padding(padding: int, size: int, axis: KernelAxis, ratio: Fraction) -> int:
    """The padding, in whole pixels and at least 0, with which the output grows like the input.

    Args:
        padding, size: the padding on both sides and the kernel size, at the original resolution.
        axis: of the kernel at `ratio` times the resolution.
    """
    lost = (size - 1 - 2 * padding) * ratio
    return max(_nearest((axis.size - 1 - lost) / 2), 0)


def _nearest(number: Fraction) -> int:
    """The nearest int; the smaller of two, because kernels were trained inside [-1, 1]."""
    return math.ceil(number - Fraction(1, 2))
