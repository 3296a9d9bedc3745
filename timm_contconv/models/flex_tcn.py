"""FlexTCN: a classifier of sequences with causal convolutions of learned length (Romero et al. 2022, section 4.2)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..layers.core.arguments import check_counts
from ..layers.flex import FlexConv1d
from .flexnet import checkpoint_filter_fn
from .tcn import TCN

__all__ = ["FlexTCN", "checkpoint_filter_fn"]


class FlexTCN(TCN):
    """Residual blocks of causal FlexConvs; the features of the last sample are classified.

    The paper's FlexTCN-2, -4 and -6 have 2, 4 and 6 blocks. Kernels are as long as the sequence. A checkpoint of the
    authors loads with `model.load_state_dict(checkpoint_filter_fn(torch.load(path), model))`.

    Args:
        in_channels, num_classes, channels, blocks, dropout: as for `TCN`.
        length: samples of a sequence, and taps of the kernels before their masks.
        flex_args: settings of the FlexConvs, as in `FlexSpec`; {"mask": False} makes it CKTCN.
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
        check_counts(length=length)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = functools.partial(FlexConv1d, kernel_size=length, padding="causal", **(flex_args or {}), **dd)
        norm = functools.partial(nn.BatchNorm1d, **dd)
        super().__init__(in_channels, num_classes, conv, norm, channels, blocks, dropout, **dd)
        nn.init.normal_(self.head.weight, std=0.01)  # as in the released code
        nn.init.zeros_(self.head.bias)
