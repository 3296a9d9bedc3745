"""Classifiers of sequences with causal convolutions as long as the sequence (Romero et al. 2022, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.core.arguments import check_counts

__all__ = ["TCN", "TemporalBlock"]

#: makes a causal convolution from the numbers of input and output channels
CausalConv = Callable[[int, int], nn.Module]
#: makes the norm after a convolution from its number of channels
Norm = Callable[[int], nn.Module]


class TemporalBlock(nn.Module):
    """Two causal convolutions, each with a norm, ReLU and dropout, beside a shortcut.

    Args:
        in_channels, out_channels: channels; if they differ, the shortcut is a 1×1 convolution.
        conv: makes the convolutions.
        norm: makes the norms; `nn.Identity` if the convolutions have their own.
        dropout: probability.
        device, dtype: of the other parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conv: CausalConv,
        norm: Norm,
        dropout: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = conv(in_channels, out_channels)
        self.conv2 = conv(out_channels, out_channels)
        self.norm1, self.norm2 = norm(out_channels), norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv1d(in_channels, out_channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T) to (N, C_out, T)."""
        y = self.dropout(self.norm1(self.conv1(x)).relu())
        y = self.dropout(self.norm2(self.conv2(y)).relu())
        return (y + self.shortcut(x)).relu()


class TCN(nn.Module):
    """Residual blocks of causal convolutions; the features of the last sample are classified.

    Args:
        in_channels: channels of the sequences.
        num_classes: outputs.
        conv: makes the convolutions.
        norm: makes the norms, as for `TemporalBlock`.
        channels: width of the blocks.
        blocks: number of blocks.
        dropout: probability in the blocks.
        device, dtype: of the other parameters.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv: CausalConv,
        norm: Norm,
        channels: int,
        blocks: int,
        dropout: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, num_classes=num_classes, channels=channels, blocks=blocks)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout}: expected a probability, from 0 to 1")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [in_channels] + [channels] * blocks
        self.num_classes = num_classes
        self.blocks = nn.Sequential(
            *(TemporalBlock(widths[i], widths[i + 1], conv, norm, dropout, **dd) for i in range(blocks))
        )
        self.head = nn.Linear(channels, num_classes, **dd)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, T) to (N, channels, T); each sample depends only on itself and earlier ones."""
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, T) to (N, num_classes)."""
        return self.head(self.forward_features(x)[..., -1])
