"""CC layers from plain strided convolutions, and back: the pixels that both read, and the kernels of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.plain import NEGLIGIBLE, PlainConv, has_same_padding, plain_conv
from .grid import Ratio, ResizedAxis, Rounding, distances, scale_text, strided_axes

__all__ = [
    "common_plateaus",
    "covering_support",
    "distance_from",
    "fit_last_layer",
    "kernel_like",
    "merged_conv",
    "require_strides",
    "rounding_of",
]


def rounding_of(conv: PlainConv) -> Rounding:
    """The rounding of size / stride in the output size of a convolution.

    Raises:
        ValueError: it is neither ceil nor floor for all sizes.
    """
    for rounding in ("ceil", "floor"):
        if all(_rounds(conv, dim, rounding) for dim in range(2)):
            return rounding
    raise ValueError(
        f"kernel_size={tuple(conv.kernel_size)}, stride={tuple(conv.stride)}, padding={conv.padding!r}: its output has"
        " neither ceil nor floor of size / stride pixels for every size, which an output resized by 1/stride has"
    )


def _rounds(conv: PlainConv, dim: int, rounding: Rounding) -> bool:
    kernel_size, stride = conv.kernel_size[dim], conv.stride[dim]
    if has_same_padding(conv):
        return rounding == "ceil" or stride == 1
    margin = 2 * _padding(conv, dim) - kernel_size + stride  # output: floor((size + margin) / stride)
    return margin == (stride - 1 if rounding == "ceil" else 0)


def require_strides(scale: Sequence[Ratio], stride: Sequence[int] | None = None) -> None:
    """Raise a ValueError if the scale is not 1/stride, or, for stride=None, not 1/k for any integer k."""
    wanted = [(1, denominator) for _, denominator in scale] if stride is None else [(1, s) for s in stride]
    if list(scale) != wanted:
        expected = "1/k, k an integer" if stride is None else f"1/stride, stride {tuple(stride)}"
        raise ValueError(
            f"scale={scale_text(scale)}: expected {expected}; set `layer.scale` before merging, or leave the model"
            " unmerged: tcc.export(..., merge=False)"
        )


# ---- from a convolution


def covering_support(conv: PlainConv, dim: int, rounding: Rounding) -> int:
    """The smallest support, at least the kernel's size, that holds all pixels that the convolution reads."""
    size = support = conv.kernel_size[dim]
    while any(
        len(range(*_overlap(conv, dim, axis)[1].indices(size))) < size
        for axis in strided_axes(conv.stride[dim], support, rounding)
    ):
        support += 1
    return support


def common_plateaus(
    convs: Sequence[PlainConv], dim: int, support: int, rounding: Rounding
) -> list[tuple[float, float]] | None:
    """Plateaus on each of which convolutions read one pixel, at all distances of `strided_axes`; None if impossible.

    Args:
        convs: the convolutions.
        dim: 0 for rows, 1 for columns.
        support: number of plateaus.
        rounding: of the layer.

    Returns:
        As `grid.plateaus`, which holds for all kernels. It pairs the pixels of images of even and odd sizes as they
        stand in the support, while a convolution may read the next ones.
    """
    found = [_plateaus_of(conv, dim, support, rounding) for conv in convs]
    return found[0] if all(plateaus == found[0] for plateaus in found) else None


def _plateaus_of(conv: PlainConv, dim: int, support: int, rounding: Rounding) -> list[tuple[float, float]] | None:
    where, taps = _distances_and_taps(conv, dim, support, rounding, torch.device("cpu"))
    pairs = sorted(zip(where.tolist(), taps.tolist(), strict=True), reverse=True)
    runs = [(tap, [d for d, _ in run]) for tap, run in itertools.groupby(pairs, key=lambda pair: pair[1])]
    if len({tap for tap, _ in runs if tap >= 0}) < sum(tap >= 0 for tap, _ in runs):
        return None
    while len(runs) > support:  # beyond the last plateau a kernel falls to 0 anyway
        runs = runs[1:] if runs[0][0] < 0 else runs[:-1]
    plateaus = [(min(distances), max(distances)) for _, distances in runs]
    while len(plateaus) < support:
        plateaus.append((plateaus[-1][0] - 1, plateaus[-1][0] - 1))
    return plateaus


@torch.no_grad()
def fit_last_layer(
    weight: Tensor,
    features: Callable[[Tensor, Tensor], Tensor],
    conv: PlainConv,
    support: Sequence[int],
    rounding: Rounding,
) -> None:
    """Set the last layer of an internal net, in place, so that the kernel is that of a strided convolution.

    Least squares over the distances of `strided_axes`. The layer's bias, the last feature, is used only if the other
    features are not exact.

    Args:
        weight: (C_out, C_in/groups, F + 1), changed.
        features: the hidden layers.
        conv: the convolution.
        support: of the continuous kernel, in pixels.
        rounding: of the layer.
    """
    found = [_distances_and_taps(conv, dim, support[dim], rounding, weight.device) for dim in (0, 1)]
    (rows, row_taps), (columns, column_taps) = found
    phi = features(rows, columns).double().flatten(0, 1)
    kernel = F.pad(conv.weight.double(), (0, 1, 0, 1))  # index -1 finds a zero
    target = kernel[:, :, row_taps][..., column_taps].flatten(2).flatten(0, 1).T
    solution = _least_squares(phi[:, :-1], target)
    left = target - phi[:, :-1] @ solution
    needs_bias = left.norm() > 1e-9 * target.norm()
    solution = _least_squares(phi, target) if needs_bias else F.pad(solution, (0, 0, 0, 1))
    weight.copy_(solution.T.view(weight.shape))


def _distances_and_taps(
    conv: PlainConv, dim: int, support: int, rounding: Rounding, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(D,) distances that occur, and the index of the kernel's pixel at each; -1 if the convolution reads none."""
    axes = strided_axes(conv.stride[dim], support, rounding)
    taps = torch.full((len(axes), support), -1, device=device)
    for row, axis in zip(taps, axes, strict=True):
        own, its = _overlap(conv, dim, axis)
        row[own] = torch.arange(its.start, its.stop, device=device)
    return torch.cat([distances(axis, 0, 1, device)[0] for axis in axes]), taps.flatten()


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """The smallest x with the least ||a x - b||, also if a is rank-deficient."""
    return torch.linalg.pinv(a, rtol=1e-8) @ b


# ---- to a convolution


def merged_conv(
    kernel: Tensor, bias: Tensor | None, axes: Sequence[ResizedAxis], rounding: Rounding, padding_mode: str, groups: int
) -> PlainConv:
    """The convolution with a CC layer's kernel at scale 1/stride.

    Args:
        kernel: (C_out, C_in/groups, height, width).
        bias: (C_out,) or None.
        axes: rows and columns of an image whose size is a multiple of the stride.
        rounding, padding_mode, groups: of the layer.
    """
    first, stride = [axis.first(0) for axis in axes], [axis.denominator for axis in axes]
    kernel = F.pad(kernel, [n for dim in (1, 0) for n in _zeros_around(kernel.shape[2 + dim], first[dim])])
    pads = [max(-index, 0) for index in first]
    size = kernel.shape[2:]
    short = any(2 * p - k != -1 for p, k in zip(pads, size, strict=True))  # fewer than ceil(size / stride) outputs
    even = all((k - s) % 2 == 0 for k, s in zip(size, stride, strict=True))
    same = rounding != "floor" and short and even and padding_mode == "zeros"
    padding: str | list[int] = "same" if same else pads
    return plain_conv(kernel, bias, stride=stride, padding=padding, groups=groups, padding_mode=padding_mode)


def _zeros_around(size: int, first: int) -> tuple[int, int]:
    """Zeros before and after a kernel that starts at pixel `first`, so that one padding fits both sides.

    A kernel smaller than the stride may start inside the image. A kernel that ends before the padding does, as an even
    one with stride 1, would give one output too many.
    """
    inside = max(first, 0)
    return inside, max(inside, -2 * first + 1 - size)


def kernel_like(conv: PlainConv, kernel: Tensor, axes: Sequence[ResizedAxis]) -> Tensor | None:
    """The kernel that gives a convolution like `conv` the output of a continuous kernel.

    Args:
        conv: the convolution; it may be on the meta device.
        kernel: (C_out, C_in/groups, S_y, S_x), at `axes`.
        axes: rows and columns of an image whose size is a multiple of the stride.

    Returns:
        (C_out, C_in/groups, *size of conv's kernel); None if more than 1e-5 of the mass would be lost.
    """
    placed = _in_place_of(conv, kernel, axes)
    mass = kernel.abs().sum(dtype=torch.float64)
    lost = mass - placed.abs().sum(dtype=torch.float64)
    return placed if lost <= NEGLIGIBLE * mass else None


@torch.no_grad()
def distance_from(conv: PlainConv, kernel: Tensor, axes: Sequence[ResizedAxis]) -> float:
    """||kernel - kernel of conv|| / ||kernel of conv||, for the sizes of `axes`; arguments as for `kernel_like`."""
    kernel, wanted = kernel.double(), conv.weight.double()
    placed = _in_place_of(conv, kernel, axes)
    elsewhere = (kernel.square().sum() - placed.square().sum()).clamp_min(0)
    distance = ((placed - wanted).square().sum() + elsewhere).sqrt()
    return float(distance / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))


# ---- pixels that both read


def _in_place_of(conv: PlainConv, kernel: Tensor, axes: Sequence[ResizedAxis]) -> Tensor:
    """A continuous kernel's pixels, moved to the pixels of a convolution's kernel that read the same input; else 0."""
    (own_rows, its_rows), (own_columns, its_columns) = (_overlap(conv, dim, axis) for dim, axis in enumerate(axes))
    placed = kernel.new_zeros(conv.weight.shape)
    placed[..., its_rows, its_columns] = kernel[..., own_rows, own_columns]
    return placed


def _overlap(conv: PlainConv, dim: int, axis: ResizedAxis) -> tuple[slice, slice]:
    """Indices of the neighbours and of a convolution's kernel, along one dimension, that read the same pixels."""
    ahead = axis.first(0) + _padding_before(conv, dim, axis)  # index in the convolution of the first neighbour
    start = max(-ahead, 0)
    stop = max(min(axis.support, conv.kernel_size[dim] - ahead), start)
    return slice(start, stop), slice(start + ahead, stop + ahead)


def _padding_before(conv: PlainConv, dim: int, axis: ResizedAxis) -> int:
    if not has_same_padding(conv):
        return _padding(conv, dim)
    total = (axis.out_size - 1) * conv.stride[dim] + conv.kernel_size[dim] - axis.size
    return max(total, 0) // 2


def _padding(conv: PlainConv, dim: int) -> int:
    return 0 if isinstance(conv.padding, str) else conv.padding[dim]
