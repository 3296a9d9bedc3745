"""SmpTCN: a classifier of sequences with causal SMP convolutions (Kim and Park 2023, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import SmpConv1d

__all__ = ["SmpTCN", "SmpTcnBlock"]


class SmpTcnBlock(nn.Module):
    """Two causal SMP convolutions, each with batch norm, ReLU and dropout, beside a shortcut.

    Args:
        in_channels, out_channels: channels; where they differ the shortcut is a 1×1 convolution.
        kernel_size: taps of the kernels; as many as the sequence has samples, in the paper.
        dropout: probability.
        **points: other arguments of `SmpConv1d`, as kernel_count.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, dropout: float = 0.1, **points: Any
    ) -> None:
        super().__init__()
        self.conv1 = SmpConv1d(in_channels, out_channels, kernel_size, padding="causal", **points)
        self.conv2 = SmpConv1d(out_channels, out_channels, kernel_size, padding="causal", **points)
        dd = {"device": self.conv1.point_weight.device, "dtype": self.conv1.point_weight.dtype}
        self.norm1 = nn.BatchNorm1d(out_channels, **dd)  # type: ignore[arg-type]
        self.norm2 = nn.BatchNorm1d(out_channels, **dd)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv1d(in_channels, out_channels, 1, **dd)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T) to (N, C_out, T)."""
        y = self.dropout(self.norm1(self.conv1(x)).relu())
        y = self.dropout(self.norm2(self.conv2(y)).relu())
        return (y + self.shortcut(x)).relu()


class SmpTCN(nn.Module):
    """Residual blocks of causal SMP convolutions; the features of the last sample are classified.

    FlexTCN's structure with SMP kernels that are as long as the sequence, 30 points each (section 4.2).

    Args:
        in_channels: channels of the sequences.
        num_classes: outputs.
        length: samples of a sequence, hence taps of the kernels.
        channels: width of the blocks.
        blocks: their number.
        dropout: probability in the blocks.
        kernel_count: points per kernel.
        initial_radius: default 4 / length, two samples.
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
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks={blocks}: expected a positive int")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        points = {"kernel_count": kernel_count, "initial_radius": initial_radius, **dd}
        widths = [in_channels] + [channels] * blocks
        self.num_classes = num_classes
        self.blocks = nn.Sequential(
            *(SmpTcnBlock(widths[i], widths[i + 1], length, dropout, **points) for i in range(blocks))
        )
        self.head = nn.Linear(channels, num_classes, **dd)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, T) to (N, channels, T); what stands at a sample depends on it and earlier ones only."""
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, T) to (N, num_classes)."""
        return self.head(self.forward_features(x)[..., -1])
