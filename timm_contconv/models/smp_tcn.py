"""SmpTCN: a classifier of sequences with causal SMP convolutions (Kim and Park 2023, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.core.arguments import check_counts
from ..layers.smp import SmpConv1d, SmpConvBn1d
from .smpnet import checkpoint_filter_fn
from .tcn import TCN

__all__ = ["SmpTCN", "checkpoint_filter_fn"]


class SmpTCN(TCN):
    """Residual blocks of causal SMP convolutions; the features of the last sample are classified.

    The structure is FlexTCN's. The SMP kernels are as long as the sequence, with 30 points each (section 4.2). Beside
    each stands a small causal convolution, and both have a batch norm. A checkpoint of the authors loads with
    `model.load_state_dict(checkpoint_filter_fn(torch.load(path), model))`.

    Args:
        in_channels, num_classes, channels, blocks, dropout: as for `TCN`.
        length: samples of a sequence, and taps of the kernels.
        kernel_count: points per kernel.
        initial_radius: half the kernel is 1. None takes 4 / length, which is two samples. The release has 0.002 for
            784 and 1024 samples, 0.012 for about 180 and 0.0002 for 16,000.
        coordinate_std: as in `SmpSpec`.
        small_kernel: taps of the small convolutions; None for none.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        length: int,
        channels: int = 30,
        blocks: int = 6,
        dropout: float = 0.1,
        kernel_count: int = 30,
        initial_radius: float | None = None,
        coordinate_std: float = 0.1,
        small_kernel: int | None = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts(length=length)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def conv(in_chs: int, out_chs: int) -> SmpConvBn1d:
            smp = SmpConv1d(
                in_chs, out_chs, length, padding="causal", bias=False, kernel_count=kernel_count,
                initial_radius=initial_radius, coordinate_std=coordinate_std, **dd,
            )  # fmt: skip
            return SmpConvBn1d(smp, small_kernel, small_bias=True)

        super().__init__(in_channels, num_classes, conv, nn.Identity, channels, blocks, dropout, **dd)
