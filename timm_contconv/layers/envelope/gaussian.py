"""The Gaussian envelope of Kobayashi 2023: a filter as a function of its width."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops import compute_dtype
from ..core.subnormals import SMALLEST_FACTOR, without_subnormals

__all__ = [
    "NEARLY_DELTA_VARIANCE",
    "envelope_filter",
    "envelope_filter_derivative",
    "is_delta",
    "raw_from_variance",
    "variance_from_raw",
]

#: sigma^2 is at least this: a delta in every dtype, and nothing overflows
SMALLEST_VARIANCE = 1 / 2000
#: sigma^2 at which a neighbour weighs 1e-6: almost nothing is smoothed, but sigma has a gradient and can grow
NEARLY_DELTA_VARIANCE = 1 / (2 * math.log(1e6))
#: below this sigma^2, exp(-1 / (2 sigma^2)) is under 1e-12 and set to 0: the filter is a delta, sigma's gradient is 0
DELTA_VARIANCE = 1 / 56


def variance_from_raw(raw: Tensor) -> Tensor:
    """sigma^2 = softplus(s), at least 1/2000, in float32 (float64 for float64)."""
    return F.softplus(raw.to(compute_dtype(raw.dtype))).clamp_min(SMALLEST_VARIANCE)


def raw_from_variance(variance: float) -> float:
    """The s of a sigma^2, at least 1/2000: the inverse of softplus."""
    variance = max(variance, SMALLEST_VARIANCE)
    return variance + math.log(-math.expm1(-variance))


def is_delta(variance: Tensor) -> bool:
    """Whether the filters of all these sigma^2 are deltas, bit for bit."""
    return bool((variance < DELTA_VARIANCE).all())


def envelope_filter(variance: Tensor, size: int) -> Tensor:
    """One-dimensional Gaussian envelopes (Kobayashi 2023, Eq. 9).

    Args:
        variance: (C,) values of sigma squared, in squared pixels, above 0.
        size: k_g, odd: the number of taps.

    Returns:
        (C, size): softmax over x = -r..r of -x^2 / (2 sigma^2), r = size // 2; taps under 1e-12 of the largest are 0.
    """
    exponent = -_squared_offsets(variance, size) / (2 * variance.unsqueeze(-1))
    return torch.softmax(F.threshold(exponent, math.log(SMALLEST_FACTOR), -math.inf), dim=-1)


def envelope_filter_derivative(variance: Tensor, size: int) -> Tensor:
    """Derivative of `envelope_filter` by the variance: dg/dsigma of Kobayashi 2023, Eq. 8, divided by 2 sigma.

    Args:
        variance, size: as for `envelope_filter`.

    Returns:
        (C, size): g[x] (x^2 - sum_xi g[xi] xi^2) / (2 sigma^4).
    """
    taps = envelope_filter(variance, size)
    squares = _squared_offsets(variance, size)
    mean = (taps * squares).sum(-1, keepdim=True)
    return without_subnormals(taps * (squares - mean) / (2 * variance.square().unsqueeze(-1)))


def _squared_offsets(like: Tensor, size: int) -> Tensor:
    """x^2 for x = -r..r."""
    return (torch.arange(size, device=like.device, dtype=like.dtype) - size // 2).square()
