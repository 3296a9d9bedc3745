"""Applying the weights of CC layers (Shocher et al. 2020, Block 4), without ever building the whole weight tensor.

Where a scale is p/q, the distances repeat every p output pixels. With small periods the layer is `p_y * p_x` ordinary
convolutions (`phase_kernels`, `interleaved_conv`), with p = 1 a single one (`strided_conv`). In general the last,
linear, layer of the internal net is applied after the sum over the neighbours (`features_first`): the same sum in
another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ops import conv
from .cc_grid import Axis, Ratio, Rounding, distances, output_size

__all__ = [
    "Plan",
    "apply_kernels",
    "features_first",
    "interleaved_conv",
    "pad_to",
    "phase_kernels",
    "plan_of",
    "resize_plan",
    "strided_conv",
]

#: a function from vertical (A,) and horizontal (B,) distances to (A, B, F) features
Features = Callable[[Tensor, Tensor], Tensor]

#: what an internal net holds for each distance, in units of its last layer: an estimate for the memory that it takes
HELD_FEATURES = 8


class Plan(NamedTuple):
    """What follows from the sizes of an image and its output.

    Attributes:
        axes: the geometry of rows and columns.
        phases: number of different sets of distances, p_y * p_x.
        offsets: distance of the first output pixel from its first neighbour, in units of 1/(2p) pixels; with scale and
            support it says what all distances are.
        padding_mode: how images go on beyond their borders.
        padding: with which a convolution itself reaches the neighbours; None where it can't, or there are phases.
    """

    axes: tuple[Axis, Axis]
    phases: int
    offsets: tuple[int, int]
    padding_mode: str
    padding: tuple[int, int] | None


def plan_of(axes: tuple[Axis, Axis], padding_mode: str) -> Plan:
    """The plan for these axes."""
    phases = axes[0].period * axes[1].period
    rows, columns = (axis.position(0) - 2 * axis.numerator * axis.first(0) for axis in axes)
    padding = _own_padding(axes, padding_mode) if phases == 1 else None
    return Plan(axes, phases, (rows, columns), padding_mode, padding)


def resize_plan(
    size: Sequence[int],
    out_size: Sequence[int] | None,
    scale: Sequence[Ratio],
    kernel_size: Sequence[int],
    rounding: Rounding,
    padding_mode: str,
) -> Plan:
    """The plan for images of `size` pixels at a scale; without an `out_size`, of size · scale, rounded."""
    if out_size is None:
        out_size = [output_size(n, ratio, rounding) for n, ratio in zip(size, scale, strict=True)]
    rows, columns = (Axis(size[d], out_size[d], *scale[d], kernel_size[d]) for d in (0, 1))
    return plan_of((rows, columns), padding_mode)


def phase_kernels(rows: Tensor, columns: Tensor, weight: Tensor, features: Features) -> Tensor:
    """The continuous kernel at the distances of every phase.

    Args:
        rows: (P_y, S_y) vertical distances to the neighbours, one row per phase.
        columns: (P_x, S_x) horizontal distances.
        weight: (C_out, C_in/groups, F) last layer of the internal net.
        features: the layers before it.

    Returns:
        (P_y, P_x, C_out, C_in/groups, S_y, S_x).
    """
    phi = features(rows.flatten(), columns.flatten())
    kernels = weight.flatten(0, 1) @ phi.flatten(0, 1).T
    kernels = kernels.view(*weight.shape[:2], *rows.shape, *columns.shape)
    return kernels.permute(2, 4, 0, 1, 3, 5)


def strided_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, plan: Plan, groups: int) -> Tensor:
    """The layer at scales 1/k: an ordinary convolution.

    Args:
        x: (N, C_in, H, W) images.
        kernel: (C_out, C_in/groups, S_y, S_x).
        bias: (C_out,) or None.
        plan: the geometry.
        groups: number of blocks of channels that are convolved apart.

    Returns:
        (N, C_out, H', W').
    """
    rows, columns = plan.axes
    padding = plan.padding
    if padding is None:
        x, padding = pad_to(x, rows.margins, columns.margins, plan.padding_mode), (0, 0)
    return conv(x, kernel, bias, (rows.denominator, columns.denominator), padding, groups)


def interleaved_conv(x: Tensor, kernels: Tensor, bias: Tensor | None, plan: Plan, groups: int) -> Tensor:
    """One strided convolution per phase; their outputs interleaved.

    Args:
        x, bias, plan, groups: as for `strided_conv`.
        kernels: (p_y, p_x, C_out, C_in/groups, S_y, S_x), as `phase_kernels` gives them.

    Returns:
        (N, C_out, H', W').
    """
    axes, memory_format = plan.axes, _memory_format(x)
    stride, periods = (axes[0].denominator, axes[1].denominator), (axes[0].period, axes[1].period)
    x = pad_to(x, _phase_margins(axes[0]), _phase_margins(axes[1]), plan.padding_mode)
    starts, counts, lengths = zip(*(_windows(axis) for axis in axes), strict=True)
    phases = [
        conv(_window(x, starts[0][i], starts[1][j], lengths), kernels[i, j], bias, stride, (0, 0), groups)
        for i in range(periods[0])
        for j in range(periods[1])
    ]
    y = torch.stack(phases).view(*periods, *x.shape[:1], kernels.shape[2], *counts)
    y = y.permute(2, 3, 4, 0, 5, 1).reshape(*y.shape[2:4], counts[0] * periods[0], counts[1] * periods[1])
    rows, columns = (torch.arange(axis.out_size, device=x.device) for axis in axes)
    return y[:, :, rows][..., columns].contiguous(memory_format=memory_format)


def apply_kernels(x: Tensor, kernels: Tensor, bias: Tensor | None, plan: Plan, groups: int) -> Tensor:
    """`strided_conv` or `interleaved_conv`, by the number of kernels."""
    if plan.phases == 1:
        return strided_conv(x, kernels[0, 0], bias, plan, groups)
    return interleaved_conv(x, kernels, bias, plan, groups)


def features_first(
    x: Tensor,
    weight: Tensor,
    features: Features,
    bias: Tensor | None,
    plan: Plan,
    groups: int,
    memory_limit: int,
) -> Tensor:
    """The neighbours summed with the features of their distances, then the net's last layer as a 1x1 convolution.

    Works for any scale. Images and rows of the output are computed in chunks, and computed again in the backward pass,
    where all at once would take more than `memory_limit`.

    Args:
        x, weight, features, bias, plan, groups: as for `phase_kernels` and `strided_conv`.
        memory_limit: bytes, as an estimate, that a chunk may take: half for the padded images with a pixel's values
            beside one another, half for neighbours, features and their sums. A chunk is at least a row of one image.
            In a backward pass all padded images are there.

    Returns:
        (N, C_out, H', W').
    """
    images, at_once = _chunk_sizes(x, weight, plan.axes, memory_limit)
    parts = [_of_images(part, weight, features, bias, plan, groups, at_once) for part in x.split(images)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunk_sizes(x: Tensor, weight: Tensor, axes: tuple[Axis, Axis], memory_limit: int) -> tuple[int, int]:
    """Images and, of these, rows of the output that are computed at once."""
    (batch, channels), taps, features = x.shape[:2], axes[0].support * axes[1].support, weight.shape[-1]
    limit = memory_limit // max(4, x.element_size()) // 2  # numbers, not bytes
    height, width = [axis.size + sum(axis.margins) for axis in axes]  # padded
    image = channels * height * width
    row = axes[1].out_size * channels * (taps + features)
    row_features = axes[1].out_size * taps * HELD_FEATURES * features
    images = min(max(min(limit // image, (limit - row_features) // row), 1), batch)
    return images, max(limit // (images * row + row_features), 1)


def _of_images(
    x: Tensor, weight: Tensor, features: Features, bias: Tensor | None, plan: Plan, groups: int, at_once: int
) -> Tensor:
    """`features_first` of all images at once, with so many rows at once."""
    axes = rows, columns = plan.axes
    neighbours = pad_to(x, rows.margins, columns.margins, plan.padding_mode)
    neighbours = neighbours.permute(2, 3, 0, 1).contiguous()  # a pixel's values lie together
    if at_once >= rows.out_size:
        y = _features_then_weight((neighbours,), weight, features, axes, groups, 0, rows.out_size)
    else:
        y = _in_chunks(neighbours, weight, features, axes, groups, at_once)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.permute(2, 3, 0, 1).contiguous(memory_format=_memory_format(x))


def _in_chunks(
    x: Tensor, weight: Tensor, features: Features, axes: tuple[Axis, Axis], groups: int, at_once: int
) -> Tensor:
    """`_features_then_weight` of all rows, so many at once; only the rows of x are kept for the backward pass."""
    rows, top = axes[0], -axes[0].first(0)
    ranges = [(start, min(start + at_once, rows.out_size)) for start in range(0, rows.out_size, at_once)]
    windows = [(rows.first(a) + top, rows.first(b - 1) + top + rows.support) for a, b in ranges]
    # cut once, where windows start or end: a slice for each would fill the whole gradient of x for each
    cuts = sorted({0, x.shape[0], *(end for window in windows for end in window)})
    pieces = dict(zip(cuts, x.split([b - a for a, b in itertools.pairwise(cuts)]), strict=False))
    chunks = []
    for (start, stop), (first, last) in zip(ranges, windows, strict=True):
        own = tuple(piece for cut, piece in pieces.items() if first <= cut < last)
        arguments = (own, weight, features, axes, groups, start, stop)
        if torch.is_grad_enabled():
            y = checkpoint(_features_then_weight, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y = _features_then_weight(*arguments)
        chunks.append(y)
    return torch.cat(chunks)


def _features_then_weight(
    pieces: tuple[Tensor, ...],
    weight: Tensor,
    features: Features,
    axes: tuple[Axis, Axis],
    groups: int,
    start: int,
    stop: int,
) -> Tensor:
    """Output rows start..stop-1, (stop - start, W', N, C_out), of their neighbours, (H, W, N, C_in) in pieces."""
    rows, columns = axes
    x = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    first_row, row_distances = distances(rows, start, stop, x.device)
    first_column, column_distances = distances(columns, 0, columns.out_size, x.device)
    row = (first_row - rows.first(start)).unsqueeze(1) + torch.arange(rows.support, device=x.device)
    column = (first_column - columns.first(0)).unsqueeze(1) + torch.arange(columns.support, device=x.device)
    index = row[:, None, :, None] * x.shape[1] + column[None, :, None, :]  # (rows, W', S_y, S_x)
    batch, channels = x.shape[2:]
    pixels, taps = (stop - start) * columns.out_size, rows.support * columns.support
    patches = x.flatten(2).flatten(0, 1).index_select(0, index.flatten()).view(pixels, taps, batch * channels)
    phi = features(row_distances.flatten(), column_distances.flatten()).to(x.dtype)
    phi = (
        phi.view(*row_distances.shape, *column_distances.shape, -1).transpose(1, 2).reshape(pixels, taps, phi.shape[-1])
    )
    sums = torch.bmm(patches.transpose(1, 2), phi)  # (pixels, N * C_in, F)
    y = _grouped_linear(sums.view(pixels * batch, channels, phi.shape[-1]), weight, groups)
    return y.view(stop - start, columns.out_size, batch, weight.shape[0])


def _grouped_linear(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """(M, C_in, F) by (C_out, C_in/groups, F) to (M, C_out)."""
    if groups == 1:
        return F.linear(x.flatten(1), weight.flatten(1))
    by_group = x.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)
    y = torch.bmm(by_group, weight.unflatten(0, (groups, -1)).flatten(2).transpose(1, 2))
    return y.transpose(0, 1).flatten(1)


def _own_padding(axes: tuple[Axis, Axis], padding_mode: str) -> tuple[int, int] | None:
    """The padding with which a convolution itself reaches the same neighbours, or None where it can't."""
    pads = tuple(-axis.first(0) for axis in axes)
    if padding_mode != "zeros" or min(pads) < 0:
        return None
    for axis, pad in zip(axes, pads, strict=True):
        if (axis.size + 2 * pad - axis.support) // axis.denominator + 1 != axis.out_size:
            return None
    return pads[0], pads[1]


def _windows(axis: Axis) -> tuple[list[int], int, int]:
    """Where each phase's neighbours start in the padded image, outputs of each phase, and pixels that these read."""
    starts = [axis.first(i) - axis.first(0) for i in range(axis.period)]
    count = -(-axis.out_size // axis.period)
    return starts, count, (count - 1) * axis.denominator + axis.support


def _window(x: Tensor, top: int, left: int, lengths: tuple[int, ...]) -> Tensor:
    return x[..., top : top + lengths[0], left : left + lengths[1]]


def _phase_margins(axis: Axis) -> tuple[int, int]:
    """Pixels to pad before and after the input, so that every phase has as many outputs."""
    before, _ = axis.margins
    starts, _, length = _windows(axis)
    return before, starts[-1] + length - before - axis.size


def pad_to(x: Tensor, rows: tuple[int, int], columns: tuple[int, int], padding_mode: str) -> Tensor:
    """Pad x at both ends of rows and columns; negative amounts crop."""
    for dim, (before, after) in ((-2, rows), (-1, columns)):
        if before < 0 or after < 0:
            start, stop = max(-before, 0), x.shape[dim] - max(-after, 0)
            x = x.narrow(dim, start, stop - start)
    amounts = [max(amount, 0) for amount in (*columns, *rows)]
    if not any(amounts):
        return x
    return F.pad(x, amounts, mode="constant" if padding_mode == "zeros" else padding_mode)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
