"""The start of CC layers: hidden layers that interpolate linearly between the pixels of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["interpolating_net", "interpolating_widths"]


def interpolating_widths(support: Sequence[int]) -> tuple[int, int, int]:
    """Units in the hidden layers of `interpolating_net`."""
    rows, columns = support
    return 2 * (rows + columns) + 4, 2 * (rows + columns), rows * columns


def interpolating_net(plateaus: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Tensor]:
    """Hidden layers whose features interpolate linearly between the pixels of a kernel.

    The features are the hat functions of a triangulation: 1 where both distances lie on a pixel's plateau, falling
    linearly to 0 at the plateaus of its neighbours. They add up to 1 between pixels. So the weights of a last layer
    without a bias are the pixels of a kernel, and the net interpolates that kernel.

    The first layer has a hinge at each end of each plateau. The second turns them into w, the distance counted in
    plateaus, and its hinges, along both axes and the diagonal. The third turns these into the hat functions
    max(0, 1 - (|a| + |b| + |a - b|) / 2), a = w_y - i, b = w_x - j.

    Args:
        plateaus: as for `InternalNet`.

    Returns:
        weight_1 to bias_3, in float64, with `interpolating_widths` units.
    """
    sizes = [len(axis) for axis in plateaus]
    warps = [_warp(axis) for axis in plateaus]
    knots = [len(positions) for positions, _ in warps]
    weight_1 = torch.zeros(sum(knots), 2, dtype=torch.float64)
    weight_1[: knots[0], 0] = weight_1[knots[0] :, 1] = 1
    bias_1 = -torch.cat([positions for positions, _ in warps])
    warped = torch.block_diag(*(slopes.unsqueeze(0) for _, slopes in warps))  # (2, H_1): w + 1 of both axes
    weight_2, bias_2 = _bends(warped, sizes)
    weight_3, bias_3 = _hats(sizes)
    return {
        "weight_1": weight_1, "bias_1": bias_1, "weight_2": weight_2, "bias_2": bias_2,
        "weight_3": weight_3, "bias_3": bias_3,
    }  # fmt: skip


def _warp(plateaus: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Hinges (positions and slopes) of w + 1: 0 far left, i + 1 on the plateau of the i-th pixel from the right."""
    low, high = torch.tensor(plateaus, dtype=torch.float64).flip(0).unbind(1)  # rising
    gap = float(low[1] - high[0]) if len(low) > 1 else 1 - float(high[0] - low[0])
    starts = torch.cat([low[:1] - gap, high])  # w rises from a start to a stop
    stops = torch.cat([low, high[-1:] + gap])
    slopes = 1 / (stops - starts)
    return torch.cat([starts, stops]), torch.cat([slopes, -slopes])


def _bends(warped: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """w_y + 1, max(0, w_y - i) for each i, the same of w_x, and max(0, w_y - w_x - k) for each k, as one layer."""
    rows, columns = warped
    diagonal = range(1 - sizes[1], sizes[0])
    weight = [rows] * (1 + sizes[0]) + [columns] * sizes[1] + [rows - columns] * len(diagonal)
    start = [0, *range(1, 1 + sizes[0]), *range(1, 1 + sizes[1]), *diagonal]
    return torch.stack(weight), -torch.tensor(start, dtype=torch.float64)


def _hats(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The hat functions as a layer after `_bends`, pixels in their order.

    With |t| = 2 max(0, t) - t a hat is max(0, 1 + a - max(0, a) - max(0, b) - max(0, a - b)), a = w_y - i, b = w_x - j.
    """
    row_bend, column_bend, diagonal_bend = 1, 1 + sizes[0], 1 + sum(sizes)
    weight = torch.zeros(sizes[0] * sizes[1], diagonal_bend + sum(sizes) - 1, dtype=torch.float64)
    bias = torch.zeros(sizes[0] * sizes[1], dtype=torch.float64)
    for row in range(sizes[0]):
        for column in range(sizes[1]):
            hat = row * sizes[1] + column
            i, j = sizes[0] - 1 - row, sizes[1] - 1 - column  # w rises with the distance, which falls along the pixels
            weight[hat, 0] = 1
            weight[hat, [row_bend + i, column_bend + j, diagonal_bend + i - j + sizes[1] - 1]] = -1
            bias[hat] = -i
    return weight, bias
