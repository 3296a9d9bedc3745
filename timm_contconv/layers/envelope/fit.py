"""Envelopes and kernels that together approximate a given kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gaussian import NEARLY_DELTA_VARIANCE, envelope_filter

__all__ = ["EnvelopeFit"]

CORRELATION = 0.95  # of neighbouring pixels in photographs
WIDEST_VARIANCE = 1.0  # pixels squared; the paper starts at softplus(0) = 0.69
HALVINGS = 40


class EnvelopeFit:
    """The kernel f for which g * f comes nearest to a kernel k, for envelopes g of one width.

    Nearest for images whose neighbouring pixels resemble each other, as in photographs and feature maps: the least
    E||(g * f - k) * x||^2 for images x with a correlation of CORRELATION^distance. Such a fit keeps low frequencies,
    and with them what a network says, much better than the least ||g * f - k||. Everything is separable.

    Args:
        kernel: k, (C_out, C_in/groups, K_y, K_x).
        taps: k_g of the envelope.
        distances: for rows and columns, pixels between taps of the kernel, and of the envelope.
    """

    def __init__(self, kernel: Tensor, taps: int, distances: Sequence[tuple[int, int]]) -> None:
        self._kernel = kernel.detach().double().cpu()
        self._taps = taps
        self._distances = distances
        pixels = self._kernel.flatten(2).flatten(0, 1)
        self._moments = pixels.mT @ pixels  # of the kernel's pixels, over all channels

    def kernel(self, variance: float) -> Tensor:
        """f, shaped like k, in float64 on the CPU; `variance` is sigma squared, in squared pixels."""
        rows, columns = (self._axis(d, variance)[2] for d in (0, 1))
        return torch.einsum("yk,oikl,xl->oiyx", rows, self._kernel, columns)

    def error(self, variance: float) -> float:
        """||g * f - k|| / ||k||."""
        (rows, row, to_row), (columns, column, to_column) = (self._axis(d, variance) for d in (0, 1))
        missed = torch.kron(rows @ to_row, columns @ to_column) - torch.kron(row, column)
        energy = self._moments.trace().clamp_min(torch.finfo(torch.float64).tiny)
        return ((missed @ self._moments).mul(missed).sum() / energy).clamp_min(0).sqrt().item()

    def widest(self, tolerance: float) -> float:
        """The largest sigma squared, from nearly a delta to one pixel, with an error within the tolerance."""
        low, high = NEARLY_DELTA_VARIANCE, WIDEST_VARIANCE
        if self.error(low) >= tolerance:
            return low
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.error(middle) <= tolerance else (low, middle)
        return low

    def _axis(self, d: int, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Along an axis: f to g * f as a matrix (L, K), k in that size (L, K), and the solution k to f (K, K)."""
        size, (between, spread) = self._kernel.shape[2 + d], self._distances[d]
        filters = envelope_filter(torch.tensor([variance], dtype=torch.float64, device="cpu"), self._taps)[0]
        reach = (self._taps - 1) * spread
        length = (size - 1) * between + reach + 1
        smoothed, wanted = filters.new_zeros(2, length, size)
        for pixel in range(size):
            first = pixel * between
            smoothed[first : first + reach + 1 : spread, pixel] = filters
            wanted[first + reach // 2, pixel] = 1
        pixels = torch.arange(length, dtype=torch.float64, device="cpu")
        weighted = smoothed.mT @ CORRELATION ** (pixels[:, None] - pixels).abs()
        return smoothed, wanted, torch.linalg.solve(weighted @ smoothed, weighted @ wanted)
