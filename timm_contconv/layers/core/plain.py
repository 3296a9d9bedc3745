"""Plain convolutions: their types, how one is built, and kernels in another size with the same centre."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from .subnormals import without_subnormals

__all__ = [
    "NEGLIGIBLE",
    "PlainConv",
    "centred",
    "copy_bias_",
    "has_same_padding",
    "kernel_in_size",
    "kernels_inside",
    "margin",
    "plain_arguments",
    "plain_conv",
    "relative_error",
    "require_weights",
    "without_zero_borders",
]

PlainConv = nn.Conv1d | nn.Conv2d | nn.Conv3d

CONVOLUTIONS: dict[int, type[PlainConv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NEGLIGIBLE = 1e-5  # part of a kernel's mass that may be cut off


def has_same_padding(conv: PlainConv) -> bool:
    """Whether the padding of a convolution is "same", PyTorch's or timm's."""
    return isinstance(conv, Conv2dSame) or conv.padding == "same"


def plain_conv(
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | str = (0, 0),
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> PlainConv:
    """A plain convolution with copies of a kernel, less its subnormal numbers, and a bias. They train if these do.

    Args:
        weight: (C_out, C_in/groups, *kernel_size) of 1 to 3 spatial dimensions.
        bias: (C_out,), or None.
        stride, padding, dilation, groups, padding_mode: as for `nn.Conv2d`. padding="same" with a stride gives timm's
            `Conv2dSame`.

    Raises:
        ValueError: padding="same" with a stride, in 1-D or 3-D or with a padding_mode other than zeros.
    """
    ndim = weight.ndim - 2
    channels, size = (weight.shape[1] * groups, weight.shape[0]), tuple(weight.shape[2:])
    settings: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": False, "device": "meta"}
    if padding == "same" and max(stride) > 1:
        if ndim != 2 or padding_mode != "zeros":
            raise ValueError(
                f"padding='same' with stride={tuple(stride)} and padding_mode={padding_mode!r}: no plain {ndim}-D"
                " convolution has it; give the padding in pixels"
            )
        conv: PlainConv = Conv2dSame(*channels, size, tuple(stride), **settings)
    else:
        given = padding if isinstance(padding, str) else tuple(padding)
        conv = CONVOLUTIONS[ndim](*channels, size, tuple(stride), given, padding_mode=padding_mode, **settings)  # type: ignore[arg-type]
    conv.weight = nn.Parameter(without_subnormals(weight.detach()), requires_grad=weight.requires_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return conv


def plain_arguments(conv: PlainConv, kernel_size: Sequence[int]) -> dict[str, Any]:
    """Constructor arguments of a layer with another kernel size that stands in for `conv`.

    The padding grows with the kernel, so that size and position of the output stay the same.

    Raises:
        ValueError: a kernel of this size can't have the centre of the old one.
    """
    padding: str | tuple[int, ...] = "same"
    if not has_same_padding(conv):
        growth = [new - now for new, now in zip(kernel_size, conv.kernel_size, strict=True)]
        padding = tuple(p + g // 2 * d for p, g, d in zip(_padding(conv), growth, conv.dilation, strict=True))
        if any(g % 2 for g in growth) or min(padding) < 0:
            raise ValueError(
                f"kernel_size={tuple(kernel_size)} can't be centred on a {conv.kernel_size} kernel with"
                f" padding={conv.padding!r}: the sizes must differ by an even number and the padding stay at least 0"
            )
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": tuple(kernel_size),
        "stride": conv.stride,
        "padding": padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }


def require_weights(convs: Iterable[PlainConv]) -> None:
    """Refuse convolutions whose kernels have no values to fit.

    Raises:
        ValueError: a kernel is on the meta device, or holds NaN or infinity.
    """
    for conv in convs:
        if conv.weight.is_meta:
            raise ValueError(
                "init='fit': the convolutions are on the meta device and hold no kernels; use init='random'"
            )
        if wrong := int((~conv.weight.detach().isfinite()).sum()):
            raise ValueError(
                f"init='fit': {wrong} of {conv.weight.numel()} values of {conv} are NaN or infinite, expected finite"
                " numbers; use init='random'"
            )


@torch.no_grad()
def copy_bias_(bias: Tensor | None, conv: PlainConv) -> None:
    """Copy the bias of a convolution to a layer, if both have one."""
    if conv.bias is not None and bias is not None:
        bias.copy_(conv.bias)


def margin(small: int, large: int) -> int:
    """Pixels of a larger kernel before a smaller one with the same centre; negative if the "larger" is smaller.

    The centre of an even kernel is the one of "same" padding.
    """
    return (large - 1) // 2 - (small - 1) // 2


def centred(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A kernel in another size with the same centre: zeros are added around it, or its borders are cut off.

    Args:
        kernel: (..., *K).
        size: D ints.

    Returns:
        (..., *size).
    """
    padding: list[int] = []
    for old, new in reversed(list(zip(kernel.shape[-len(size) :], size, strict=True))):
        padding += [margin(old, new), new - old - margin(old, new)]
    return F.pad(kernel, padding)


def without_zero_borders(conv: PlainConv) -> PlainConv:
    """The convolution without borders of zeros around its kernel, as far as its padding can follow.

    Values below a rounding error of the kernel's largest count as zero. The output stays the same. A kernel on the meta
    device has no values, and a dilated one is not cropped; then it is the same convolution.
    """
    if conv.weight.is_meta or max(conv.dilation) > 1:
        return conv
    cut = [_border(conv, dim) for dim in range(len(conv.kernel_size))]
    if not any(cut):
        return conv
    size = [k - 2 * c for k, c in zip(conv.kernel_size, cut, strict=True)]
    cropped = plain_conv(
        centred(conv.weight.detach(), size), conv.bias, stride=conv.stride,
        padding="same" if has_same_padding(conv) else [p - c for p, c in zip(_padding(conv), cut, strict=True)],
        groups=conv.groups, padding_mode=conv.padding_mode,
    )  # fmt: skip
    cropped.weight.requires_grad_(conv.weight.requires_grad)
    return cropped.train(conv.training)


@torch.no_grad()
def _border(conv: PlainConv, dim: int) -> int:
    """Pixels that can be cut off both ends of a convolution's kernel along a dimension."""
    kernel = conv.weight.abs()
    size, stride = conv.kernel_size[dim], conv.stride[dim]
    rounding = min(torch.finfo(kernel.dtype).eps, torch.finfo(torch.float32).eps) / 8
    others = [d for d in range(kernel.ndim) if d != 2 + dim]
    largest = kernel.amax(others)
    used = (largest > rounding * largest.max()).nonzero().flatten().tolist() or [size // 2]
    border = min(used[0], size - 1 - used[-1])
    if not has_same_padding(conv):
        return min(border, _padding(conv)[dim])
    return min(border, max((size - stride) // 2, 0))  # a smaller kernel would need a negative padding for some images


def _padding(conv: PlainConv) -> tuple[int, ...]:
    return (0,) * len(conv.kernel_size) if isinstance(conv.padding, str) else tuple(conv.padding)


def kernels_inside(convs: Sequence[PlainConv], size: Sequence[int]) -> list[Tensor]:
    """The parts of convolutions' kernels that lie inside `size`, all in the size of the largest."""
    sizes = [max(conv.kernel_size[d] for conv in convs) for d in range(len(size))]
    common = [min(old, new) for old, new in zip(sizes, size, strict=True)]
    return [centred(conv.weight.detach(), common) for conv in convs]


def kernel_in_size(kernel: Tensor, size: Sequence[int]) -> Tensor | None:
    """The kernel in another size, (..., *size); None if more than 1e-5 of its mass lies outside."""
    cropped = centred(kernel, size)
    mass = kernel.abs().sum(dtype=torch.float64)
    outside = mass - cropped.abs().sum(dtype=torch.float64)
    return cropped.clone() if outside <= NEGLIGIBLE * mass else None


@torch.no_grad()
def relative_error(kernel: Tensor, target: Tensor) -> float:
    """||kernel - target|| / ||target|| in float64, both with one centre in the larger of the two sizes."""
    size = [max(a, b) for a, b in zip(kernel.shape[2:], target.shape[2:], strict=True)]
    wanted = centred(target.double(), size)
    distance = torch.linalg.vector_norm(centred(kernel.double(), size) - wanted)
    return (distance / torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(torch.float64).tiny)).item()
