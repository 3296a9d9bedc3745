"""A Gaussian envelope as plain convolutions: two depthwise ones, or folded into one larger kernel."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import Conv2dSame
from torch import Tensor, nn

from ..core.plain import PlainConv, plain_conv
from .smoothing import filter_axis

__all__ = [
    "dense_padding",
    "fold_envelope",
    "is_plain",
    "require_plain",
    "smoothing_convs",
    "spread_taps",
    "taps_per_kernel",
]


def is_plain(conv: nn.Module) -> bool:
    """Whether a convolution is its weight and bias and nothing else: not an adapter, not parametrised."""
    return type(conv) in (nn.Conv2d, Conv2dSame)


def require_plain(conv: nn.Module) -> None:
    """Refuse a convolution that can't be folded.

    Raises:
        ValueError: names its class and the way out.
    """
    if not is_plain(conv):
        raise ValueError(
            f"conv: expected an nn.Conv2d to fold the envelope into, not {type(conv).__name__}; merge the adapter or"
            " remove the parametrisation first, or use to_conv(), which keeps the module as it is"
        )


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
    rows = plain_conv(
        taps.view(channels, 1, size, 1), None, stride=(stride[0], 1), padding=(size // 2, 0), groups=channels,
        padding_mode=padding_mode,
    )  # fmt: skip
    columns = plain_conv(
        taps.view(channels, 1, 1, size), bias, stride=(1, stride[1]), padding=(0, size // 2), groups=channels,
        padding_mode=padding_mode,
    )  # fmt: skip
    return [rows, columns]


def taps_per_kernel(taps: Tensor, out_channels: int, groups: int, by_input: bool) -> Tensor:
    """The filter that goes with each kernel of a convolution.

    Args:
        taps: (C, k_g); C is C_in if `by_input`, else C_out.
        out_channels, groups: of the convolution.
        by_input: its input is smoothed, not its output.

    Returns:
        (C_out, C_in/groups, k_g), or (C_out, 1, k_g) where its output is smoothed.
    """
    if not by_input:
        return taps.unsqueeze(1)
    return taps.unflatten(0, (groups, -1)).repeat_interleave(out_channels // groups, 0)


def fold_envelope(weight: Tensor, taps: Tensor, distances: Sequence[int] = (1, 1)) -> Tensor:
    """Convolve kernels with separable envelopes: w = g * f (Kobayashi 2023, Eq. 1).

    Args:
        weight: (C_out, C_in/groups, K_y, K_x) kernels f, not dilated.
        taps: (C_out, C_in/groups, k_g) or (C_out, 1, k_g) envelopes g.
        distances: of the taps along each axis, in pixels.

    Returns:
        (C_out, C_in/groups, K_y + (k_g - 1) distances[0], K_x + (k_g - 1) distances[1]).
    """
    kernels = weight.flatten(0, 1).unsqueeze(0)
    filters = taps.expand(*weight.shape[:2], -1).flatten(0, 1)[None, :, None]
    for axis, distance in enumerate(distances):
        spread = spread_taps(filters, (1, distance))[0, :, 0]
        kernels = filter_axis(kernels, spread, axis, 1, spread.shape[-1] - 1)
    return kernels.squeeze(0).unflatten(0, weight.shape[:2])


def spread_taps(kernel: Tensor, distances: Sequence[int]) -> Tensor:
    """A dilated kernel written out: zeros between the taps.

    Args:
        kernel: (A, B, K_y, K_x).
        distances: distance of the taps along each axis, in pixels.

    Returns:
        (A, B, (K_y - 1) distances[0] + 1, (K_x - 1) distances[1] + 1).
    """
    sizes = [(size - 1) * distance + 1 for size, distance in zip(kernel.shape[2:], distances, strict=True)]
    spread = kernel.new_zeros(*kernel.shape[:2], *sizes)
    spread[..., :: distances[0], :: distances[1]] = kernel
    return spread


def dense_padding(
    padding: Sequence[int] | str,
    margins: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Sequence[int] | str:
    """The padding with which a kernel that is larger by these margins on each side computes the same positions.

    Args:
        padding, kernel_size, stride, dilation: of the convolution with the smaller kernel.
        margins: pixels along each axis.

    Raises:
        ValueError: padding="same" with a stride above a kernel of more than one pixel.
    """
    if not isinstance(padding, str):
        return [p + m for p, m in zip(padding, margins, strict=True)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    if max(reach) == 1:  # "same" adds no padding to a single pixel
        return margins
    if any(r < s for r, s in zip(reach, stride, strict=True)):
        raise ValueError(
            f"padding='same' with kernel_size={tuple(kernel_size)} and stride={tuple(stride)}: no padding puts a dense"
            " kernel where the small one was; to_conv() and tcc.merge(model) without dense=True keep the layer exact"
        )
    return "same"
