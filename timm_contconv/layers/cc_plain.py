"""CC layers and plain strided convolutions: which pixels both read, and how each gets the other's kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from .cc_grid import Axis, Rounding, distances, output_size
from .replacement import PlainConv

__all__ = ["conv_axes", "covering_support", "fit_last_layer", "kernel_overlap", "rounding_of", "strided_plain_conv"]

#: any multiple: only what is left over after a whole number of strides matters
STRIDES = 4


def rounding_of(conv: PlainConv) -> Rounding:
    """How the output size of a convolution rounds size / stride.

    Raises:
        ValueError: it is neither ceil(size / stride) nor floor(size / stride) for all sizes.
    """
    for rounding in ("ceil", "floor"):
        if all(_rounds(conv, dim, rounding) for dim in range(2)):
            return rounding
    raise ValueError(
        f"kernel_size={tuple(conv.kernel_size)}, stride={tuple(conv.stride)}, padding={conv.padding!r}: its output has"
        " neither ceil nor floor of size / stride pixels for every size, which an output resized by 1/stride has"
    )


def _rounds(conv: PlainConv, dim: int, rounding: str) -> bool:
    kernel_size, stride = conv.kernel_size[dim], conv.stride[dim]
    if _is_same(conv):
        return rounding == "ceil" or stride == 1
    margin = 2 * _padding(conv, dim) - kernel_size + stride  # output: floor((size + margin) / stride)
    return margin == (stride - 1 if rounding == "ceil" else 0)


def conv_axes(stride: int, support: int, rounding: Rounding) -> list[Axis]:
    """Axes at scale 1/stride: sizes that are multiples of the stride, and those beside them with another parity.

    The distances of all further sizes are among those of the two, so no more can be asked for.
    """
    beside = 1 if rounding == "floor" else -1
    sizes = [STRIDES * stride] if stride == 1 else [STRIDES * stride, STRIDES * stride + beside]
    return [Axis(size, output_size(size, (1, stride), rounding), 1, stride, support) for size in sizes]


def overlap(conv: PlainConv, dim: int, axis: Axis, rounding: Rounding) -> tuple[slice, slice]:
    """Where along one dimension a continuous kernel and that of a convolution read the same pixels.

    Returns:
        Indices of the neighbours, and of the convolution's kernel.
    """
    ahead = axis.first(0) + _padding_before(conv, dim, axis)  # index in the convolution of the first neighbour
    start = max(-ahead, 0)
    stop = max(min(axis.support, conv.kernel_size[dim] - ahead), start)
    return slice(start, stop), slice(start + ahead, stop + ahead)


def kernel_overlap(
    conv: PlainConv, axes: Sequence[Axis], rounding: Rounding
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indices of the pixels that a kernel at `axes` and that of `conv` have in the same places: in each of them.

    Both are (C_out, C_in/groups, height, width).
    """
    pairs = [overlap(conv, dim, axis, rounding) for dim, axis in enumerate(axes)]
    own, its = ((slice(None), slice(None), *(pair[i] for pair in pairs)) for i in (0, 1))
    return own, its


def strided_plain_conv(
    kernel: Tensor, stride: tuple[int, ...], first: Sequence[int], rounding: Rounding, padding_mode: str, groups: int
) -> nn.Conv2d:
    """The convolution, without a bias, with a CC layer's kernel at scale 1/stride.

    Args:
        kernel: (C_out, C_in/groups, height, width).
        stride: of the convolution.
        first: index of the first output pixel's first neighbour, for rows and columns.
        rounding, padding_mode, groups: of the layer.
    """
    pads = [max(-index, 0) for index in first]
    kernel = nn.functional.pad(kernel, [n for dim in (1, 0) for n in _zeros_around(kernel.shape[2 + dim], first[dim])])
    size, channels = tuple(kernel.shape[2:]), (kernel.shape[1] * groups, kernel.shape[0])
    short = any(2 * p - k != -1 for p, k in zip(pads, size, strict=True))  # of ceil(size / stride) outputs
    even = all((k - s) % 2 == 0 for k, s in zip(size, stride, strict=True))
    if rounding != "floor" and short and even and padding_mode == "zeros":
        conv: nn.Conv2d = Conv2dSame(*channels, size, stride, groups=groups, bias=False, device="meta")
    else:
        conv = nn.Conv2d(
            *channels, size, stride, tuple(pads),  # type: ignore[arg-type]
            groups=groups, bias=False, padding_mode=padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
    conv.weight = nn.Parameter(kernel.clone())
    return conv


def _zeros_around(size: int, first: int) -> tuple[int, int]:
    """With which a kernel that reaches from pixel `first` on is placed by the same padding on both sides.

    It may start inside, being smaller than the stride; and where it ends before the padding does, as even ones with
    stride 1, it would be applied once too often.
    """
    inside = max(first, 0)
    return inside, max(inside, -2 * first + 1 - size)


def covering_support(conv: PlainConv, dim: int, rounding: Rounding) -> int:
    """The smallest support, at least the kernel's size, that holds all pixels that the convolution reads."""
    size = support = conv.kernel_size[dim]
    while any(
        len(range(*overlap(conv, dim, axis, rounding)[1].indices(size))) < size
        for axis in conv_axes(conv.stride[dim], support, rounding)
    ):
        support += 1
    return support


@torch.no_grad()
def fit_last_layer(
    weight: Tensor,
    features: Callable[[Tensor, Tensor], Tensor],
    conv: PlainConv,
    kernel_size: Sequence[int],
    rounding: Rounding,
) -> None:
    """Set the last layer of an internal net, in place, so that the kernel is that of a strided convolution.

    Least squares over the distances of `conv_axes`; the layer's bias, the last feature, is used where the others
    leave something.

    Args:
        weight: (C_out, C_in/groups, F + 1), changed.
        features: the hidden layers.
        conv: the convolution.
        kernel_size: support of the continuous kernel.
        rounding: of the layer.
    """
    found = [_distances_and_taps(conv, dim, kernel_size[dim], rounding, weight.device) for dim in (0, 1)]
    (rows, row_taps), (columns, column_taps) = found
    phi = features(rows, columns).double().flatten(0, 1)
    kernel = torch.nn.functional.pad(conv.weight.double(), (0, 1, 0, 1))  # index -1 finds a zero
    target = kernel[:, :, row_taps][..., column_taps].flatten(2).flatten(0, 1).T
    solution = _least_squares(phi[:, :-1], target)
    left = target - phi[:, :-1] @ solution
    if left.norm() > 1e-9 * target.norm():
        solution = _least_squares(phi, target)
    else:
        solution = torch.nn.functional.pad(solution, (0, 0, 0, 1))
    weight.copy_(solution.T.view(weight.shape))


def _distances_and_taps(
    conv: PlainConv, dim: int, support: int, rounding: Rounding, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(D,) distances that occur, and the index of the kernel's pixel at each, -1 where the convolution reads none."""
    axes = conv_axes(conv.stride[dim], support, rounding)
    taps = torch.full((len(axes), support), -1, device=device)
    for row, axis in zip(taps, axes, strict=True):
        own, its = overlap(conv, dim, axis, rounding)
        row[own] = torch.arange(its.start, its.stop, device=device)
    where = torch.cat([distances(axis, 0, 1, device)[1][0] for axis in axes])
    return where, taps.flatten()


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """The smallest x with the least ||a x - b||, also where a has a low rank."""
    return torch.linalg.pinv(a, rtol=1e-8) @ b


def _padding_before(conv: PlainConv, dim: int, axis: Axis) -> int:
    if not _is_same(conv):
        return _padding(conv, dim)
    total = (axis.out_size - 1) * conv.stride[dim] + conv.kernel_size[dim] - axis.size
    return max(total, 0) // 2


def _is_same(conv: PlainConv) -> bool:
    return isinstance(conv, Conv2dSame) or conv.padding == "same"


def _padding(conv: PlainConv, dim: int) -> int:
    return 0 if isinstance(conv.padding, str) else conv.padding[dim]
