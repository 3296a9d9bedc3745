"""CC layers at any scale: the last layer of the internal net comes after the sum over the neighbours.

The last layer is linear, so the sum of Shocher et al. 2020, Block 4, can be computed on its input features. This gives
the same result and never needs the weights of all output pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core.padding import pad_image
from .grid import ResizedAxis, distances, neighbours
from .phases import as_images
from .plan import Plan

__all__ = ["Features", "features_first"]

#: a function from vertical (A,) and horizontal (B,) distances to (A, B, F) features
Features = Callable[[Tensor, Tensor], Tensor]

#: bytes; half of the CPU's limit, for the values of a chunk, is about the size of a core's cache
MEMORY_LIMIT_CPU, MEMORY_LIMIT = 2**23, 2**29

#: estimate of the numbers that an internal net holds for each distance, relative to the size of its last layer
HELD_FEATURES = 8


def features_first(
    x: Tensor,
    weight: Tensor,
    features: Features,
    bias: Tensor | None,
    plan: Plan,
    groups: int,
    memory_limit: int | None = None,
) -> Tensor:
    """Sum the neighbours, weighted by the features of their distances; then apply the last layer as a 1x1 convolution.

    If this needs more than `memory_limit`, images and output rows are computed in chunks, and again in the backward
    pass.

    Args:
        x: (N, C_in, H, W) images.
        weight: (C_out, C_in/groups, F) last layer of the internal net.
        features: the layers before it.
        bias: (C_out,) or None.
        plan: the geometry.
        groups: as for `nn.Conv2d`.
        memory_limit: estimated bytes that a chunk may take: half for the padded images, channels last, half for
            neighbours, features and their sums. A chunk is at least a row of one image. A backward pass holds all
            padded images. None is 8 MiB on the CPU and 512 MiB elsewhere.

    Returns:
        (N, C_out, H', W').
    """
    limit = memory_limit or (MEMORY_LIMIT_CPU if x.is_cpu else MEMORY_LIMIT)
    images, at_once = _chunk_sizes(x, weight, plan.axes, limit)
    parts = [_of_images(part, weight, features, bias, plan, groups, at_once) for part in x.split(images)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunk_sizes(
    x: Tensor, weight: Tensor, axes: tuple[ResizedAxis, ResizedAxis], memory_limit: int
) -> tuple[int, int]:
    """The number of images, and of output rows of these images, that are computed at once."""
    (batch, channels), taps, features = x.shape[:2], axes[0].support * axes[1].support, weight.shape[-1]
    limit = memory_limit // max(4, x.element_size()) // 2  # numbers, not bytes
    height, width = [axis.size + sum(axis.margins()) for axis in axes]  # padded
    image = channels * height * width
    row = axes[1].out_size * channels * (taps + features)
    row_features = axes[1].out_size * taps * HELD_FEATURES * features
    images = min(max(min(limit // image, (limit - row_features) // row), 1), batch)
    return images, max(limit // (images * row + row_features), 1)


def _of_images(
    x: Tensor, weight: Tensor, features: Features, bias: Tensor | None, plan: Plan, groups: int, at_once: int
) -> Tensor:
    """`features_first` for all images at once, `at_once` rows at a time."""
    axes = rows, columns = plan.axes
    padded = pad_image(x, (rows.margins(), columns.margins()), plan.padding_mode)
    padded = padded.permute(2, 3, 0, 1).contiguous()  # a pixel's values lie together
    if at_once >= rows.out_size:
        y = _features_then_weight((padded,), weight, features, axes, groups, 0, rows.out_size)
    else:
        y = _in_chunks(padded, weight, features, axes, groups, at_once)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return as_images(y.permute(2, 3, 0, 1), x)


def _in_chunks(
    x: Tensor, weight: Tensor, features: Features, axes: tuple[ResizedAxis, ResizedAxis], groups: int, at_once: int
) -> Tensor:
    """`_features_then_weight` of all rows, `at_once` at a time; the backward pass keeps only the rows of x."""
    rows, top = axes[0], -axes[0].first(0)
    ranges = [(start, min(start + at_once, rows.out_size)) for start in range(0, rows.out_size, at_once)]
    windows = [(rows.first(a) + top, rows.first(b - 1) + top + rows.support) for a, b in ranges]
    # one split at all starts and ends of windows: the backward pass of a slice would fill the whole gradient of x
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
    axes: tuple[ResizedAxis, ResizedAxis],
    groups: int,
    start: int,
    stop: int,
) -> Tensor:
    """Output rows start..stop-1, (stop - start, W', N, C_out), from input rows (H, W, N, C_in), given in pieces."""
    rows, columns = axes
    x = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    row = neighbours(rows, start, stop, x.device) - rows.first(start)
    column = neighbours(columns, 0, columns.out_size, x.device) - columns.first(0)
    index = row[:, None, :, None] * x.shape[1] + column[None, :, None, :]  # (rows, W', S_y, S_x)
    batch, channels = x.shape[2:]
    pixels, taps = (stop - start) * columns.out_size, rows.support * columns.support
    patches = x.flatten(2).flatten(0, 1).index_select(0, index.flatten()).view(pixels, taps, batch * channels)
    row_distances = distances(rows, start, stop, x.device)
    column_distances = distances(columns, 0, columns.out_size, x.device)
    phi = features(row_distances.flatten(), column_distances.flatten()).to(x.dtype)
    phi = phi.view(*row_distances.shape, *column_distances.shape, -1).transpose(1, 2)
    phi = phi.reshape(pixels, taps, phi.shape[-1])
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
