"""The pixels of a kernel that is a function over [-1, 1], at the resolution that it was made for and at others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ...ops import compute_dtype

__all__ = ["Axis", "resampled_padding", "sampled_axis"]


@dataclass(frozen=True)
class Axis:
    """Pixels along one dimension of a kernel.

    Attributes:
        size: their number.
        extent: steps from pixel to pixel between -1 and 1; 0 for a function that was made for a single pixel, at 0.
        centre: the pixel at 0, counted from 0; it may lie between two.
    """

    size: int
    extent: float
    centre: float

    @property
    def half(self) -> float:
        """Steps from 0 to 1."""
        return (self.extent or 1) / 2

    def positions(self, first: int, end: int, like: Tensor) -> Tensor:
        """Where the pixels from `first` to before `end` are, (end - first,), in the precision of construction."""
        pixels = torch.arange(first, end, device=like.device, dtype=compute_dtype(like.dtype))
        return (pixels - self.centre) / self.half


def sampled_axis(size: int, ratio: Fraction, causal: bool) -> Axis:
    """The axis of a kernel of `size` pixels at `ratio` times the resolution.

    Steps are 1 / ratio as large, exactly. They count from the centre, or from the last pixel of a causal kernel, which
    is the newest sample. As many pixels are taken as lie in [-1, 1] or end nearest to it; about a centre an even number
    of them stays even while two are left.
    """
    extent = (size - 1) * ratio
    if causal:
        steps = _nearest(extent)
        return Axis(steps + 1, float(extent), float(steps - extent / 2))
    odd = (size - 1) % 2 if extent >= 1 else 0
    steps = 2 * _nearest((extent - odd) / 2) + odd
    return Axis(steps + 1, float(extent), steps / 2)


def resampled_padding(padding: int, size: int, axis: Axis, ratio: Fraction) -> int:
    """The padding with which the output grows as the input does, as nearly as whole pixels can; at least 0.

    Args:
        padding, size: on both sides and of the kernel, at the resolution that it was made for.
        axis: of the kernel at `ratio` times the resolution.
    """
    lost = (size - 1 - 2 * padding) * ratio
    return max(_nearest((axis.size - 1 - lost) / 2), 0)


def _nearest(number: Fraction) -> int:
    """Of two that are as near, the smaller one: kernels were trained inside of [-1, 1]."""
    return math.ceil(number - Fraction(1, 2))
