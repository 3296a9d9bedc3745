"""SmpTCN: a classifier of sequences with causal SMP convolutions (Kim and Park 2023, section 4.2)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..layers import SmpConv1d
from ..layers.core.arguments import check_counts
from .tcn import TCN

__all__ = ["SmpTCN"]


class SmpTCN(TCN):
    """Residual blocks of causal SMP convolutions; the features of the last sample are classified.

    The structure is FlexTCN's. The SMP kernels are as long as the sequence, with 30 points each (section 4.2).

    Args:
        in_channels: channels of the sequences.
        num_classes: outputs.
        length: samples of a sequence, and taps of the kernels.
        channels: width of the blocks.
        blocks: number of blocks.
        dropout: probability in the blocks.
        kernel_count: points per kernel.
        initial_radius: None takes 4 / length, which is two samples.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        length: int,
        channels: int = 64,
        blocks: int = 2,
        dropout: float = 0.1,
        kernel_count: int = 30,
        initial_radius: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts(length=length)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = functools.partial(
            SmpConv1d, kernel_size=length, padding="causal", kernel_count=kernel_count, initial_radius=initial_radius,
            **dd,
        )  # fmt: skip
        super().__init__(in_channels, num_classes, conv, channels, blocks, dropout, **dd)
