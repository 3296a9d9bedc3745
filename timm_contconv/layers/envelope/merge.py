"""A Gaussian envelope as plain convolutions: two depthwise ones, or folded into one larger kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ..core.plain import PlainConv, plain_conv
from .smoothing import filter_axis

__all__ = ["dense_kernel", "dense_padding", "is_plain", "smoothing_convs", "spread_taps"]


def is_plain(conv: nn.Module) -> bool:
    """Whether a module is a plain convolution: no adapter, no parametrisation."""
    return type(conv) in (nn.Conv2d, Conv2dSame)


def smoothing_convs(
    taps: Tensor, stride: Sequence[int], padding_mode: str, bias: Tensor | None = None
) -> list[PlainConv]:
    """The two passes of `smooth` as depthwise convolutions.

    Args:
        taps: (C, k_g), the filter of every channel.
        stride, padding_mode: as for `smooth`.
        bias: (C,), which the second pass adds.
    """
    channels, size = taps.shape
    settings: dict[str, Any] = {"groups": channels, "padding_mode": padding_mode}
    rows, columns = taps.view(channels, 1, size, 1), taps.view(channels, 1, 1, size)
    return [
        plain_conv(rows, None, stride=(stride[0], 1), padding=(size // 2, 0), **settings),
        plain_conv(columns, bias, stride=(1, stride[1]), padding=(0, size // 2), **settings),
    ]


@torch.no_grad()
def dense_kernel(conv: nn.Conv2d, taps: Tensor, distances: Sequence[int]) -> Tensor:
    """The kernel of a convolution with separable envelopes folded in: w = g * f (Kobayashi 2023, Eq. 1).

    Args:
        conv: the convolution with the kernels f.
        taps: (C_out, C_in/groups, k_g), the envelope g of every kernel.
        distances: between taps along each axis, in pixels.

    Returns:
        (C_out, C_in/groups, K_y + (k_g - 1) distances[0], K_x + (k_g - 1) distances[1]); K is the size of f with its
        dilation written out as zeros.

    Raises:
        ValueError: `conv` is more than a plain convolution.
    """
    if not is_plain(conv):
        raise ValueError(
            f"conv: expected an nn.Conv2d to fold the envelope into, not {type(conv).__name__}; merge the adapter or"
            " remove the parametrisation first, or use to_conv(), which keeps the module as it is"
        )
    weight = spread_taps(conv.weight, conv.dilation)
    kernels, filters = weight.flatten(0, 1).unsqueeze(0), taps.flatten(0, 1)[None, :, None]
    for axis, distance in enumerate(distances):
        spread = spread_taps(filters, (1, distance))[0, :, 0]
        kernels = filter_axis(kernels, spread, axis, 1, spread.shape[-1] - 1)
    return kernels.squeeze(0).unflatten(0, weight.shape[:2])


def spread_taps(kernel: Tensor, distances: Sequence[int]) -> Tensor:
    """A kernel with zeros between its taps, as dilation spreads them.

    Args:
        kernel: (A, B, K_y, K_x).
        distances: between taps along each axis, in pixels.

    Returns:
        (A, B, (K_y - 1) distances[0] + 1, (K_x - 1) distances[1] + 1).
    """
    sizes = [(size - 1) * distance + 1 for size, distance in zip(kernel.shape[2:], distances, strict=True)]
    spread = kernel.new_zeros(*kernel.shape[:2], *sizes)
    spread[..., :: distances[0], :: distances[1]] = kernel
    return spread


def dense_padding(
    padding: Sequence[int] | str, margins: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int]
) -> Sequence[int] | str:
    """The padding of a kernel that is larger by `margins` on each side, for the same output positions.

    Args:
        padding, kernel_size, stride: of the convolution with the smaller kernel, its dilation written out.
        margins: pixels along each axis.

    Raises:
        ValueError: padding="same" and a stride larger than a kernel of more than one pixel.
    """
    if not isinstance(padding, str):
        return [p + m for p, m in zip(padding, margins, strict=True)]
    if max(kernel_size) == 1:  # "same" adds no padding to a single pixel
        return margins
    if any(k < s for k, s in zip(kernel_size, stride, strict=True)):
        raise ValueError(
            f"padding='same' with kernel_size={tuple(kernel_size)} and stride={tuple(stride)}: no padding gives a dense"
            " kernel the positions of the small one; use to_conv(), or tcc.merge(model) without dense=True"
        )
    return "same"
