"""Multiply-adds of a separable smoothing before a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["largest_input", "smoothing_multiply_adds"]


def smoothing_multiply_adds(size: Sequence[int], channels: int, taps: int, stride: Sequence[int]) -> int:
    """Multiply-adds of the two passes of `smooth` over one image, (C, *size).

    With stride 1 they are the paper's 2 k_g C H W (Kobayashi 2023, section 3.1).
    """
    rows = math.ceil(size[0] / stride[0])
    return taps * channels * rows * (size[1] + math.ceil(size[1] / stride[1]))


def largest_input(
    output_size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int] | str
) -> list[int]:
    """Size of the largest image for which a convolution has an output of `output_size` pixels."""
    pads = [k - 1 for k in kernel_size] if isinstance(padding, str) else [2 * p for p in padding]
    return [n * s + k - 1 - p for n, k, s, p in zip(output_size, kernel_size, stride, pads, strict=True)]
