"""FlexTCN: a classifier of sequences with causal convolutions of learned length (Romero et al. 2022, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import FlexConv1d

__all__ = ["FlexTCN", "FlexTcnBlock"]


class FlexTcnBlock(nn.Module):
    """Two causal FlexConvs, each with batch norm, ReLU and dropout, beside a shortcut.

    Args:
        in_channels, out_channels: channels; where they differ the shortcut is a 1×1 convolution.
        kernel_size: taps of the kernels before their masks; as many as the sequence has samples, in the paper.
        dropout: probability.
        **flex: other arguments of `FlexConv1d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, dropout: float = 0.1, **flex: Any
    ) -> None:
        super().__init__()
        self.conv1 = FlexConv1d(in_channels, out_channels, kernel_size, padding="causal", **flex)
        self.conv2 = FlexConv1d(out_channels, out_channels, kernel_size, padding="causal", **flex)
        dd: dict[str, Any] = {"device": self.conv1.output_bias.device, "dtype": self.conv1.output_bias.dtype}
        self.norm1 = nn.BatchNorm1d(out_channels, **dd)
        self.norm2 = nn.BatchNorm1d(out_channels, **dd)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv1d(in_channels, out_channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, T) to (N, C_out, T)."""
        y = self.dropout(self.norm1(self.conv1(x)).relu())
        y = self.dropout(self.norm2(self.conv2(y)).relu())
        return (y + self.shortcut(x)).relu()


class FlexTCN(nn.Module):
    """Residual blocks of causal FlexConvs; the features of the last sample are classified.

    The paper's FlexTCN-2, -4 and -6 have so many blocks. Kernels are as long as the sequence.

    Args:
        in_channels: channels of the sequences.
        num_classes: outputs.
        length: samples of a sequence, hence taps of the kernels before their masks.
        channels: width of the blocks.
        blocks: their number.
        dropout: probability in the blocks.
        flex_args: other arguments of `FlexConv1d`; {"mask": False} makes it CKTCN.
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
        blocks: int = 2,
        dropout: float = 0.1,
        flex_args: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks={blocks}: expected a positive int")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        flex = {**(flex_args or {}), **dd}
        widths = [in_channels] + [channels] * blocks
        self.num_classes = num_classes
        self.blocks = nn.Sequential(
            *(FlexTcnBlock(widths[i], widths[i + 1], length, dropout, **flex) for i in range(blocks))
        )
        self.head = nn.Linear(channels, num_classes, **dd)
        nn.init.normal_(self.head.weight, std=0.01)  # as the released code
        nn.init.zeros_(self.head.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, T) to (N, channels, T); what stands at a sample depends on it and earlier ones only."""
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, T) to (N, num_classes)."""
        return self.head(self.forward_features(x)[..., -1])
