"""The geometry of a CC layer for one size of images and outputs: its kernels, and their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .grid import Ratio, ResizedAxis, Rounding, output_size

__all__ = ["Plan", "resize_plan"]


class Plan(NamedTuple):
    """The geometry for one size of images and outputs.

    Attributes:
        axes: the geometry of rows and columns.
        phases: number of different sets of distances, p_y * p_x.
        key: determines all distances. For rows and columns: numerator, denominator, support, and the distance of the
            first output pixel from its first neighbour in units of 1/(2p) pixels.
        padding_mode: as for `nn.Conv2d`.
        padding: of a convolution that reads the same neighbours; None if there is none, or several phases.
    """

    axes: tuple[ResizedAxis, ResizedAxis]
    phases: int
    key: tuple[tuple[int, ...], ...]
    padding_mode: str
    padding: tuple[int, int] | None


def resize_plan(
    size: Sequence[int],
    out_size: Sequence[int] | None,
    scale: Sequence[Ratio],
    support: Sequence[int],
    rounding: Rounding,
    padding_mode: str,
    fix_start: bool = False,
) -> Plan:
    """The plan for images of `size` pixels at a scale. The default `out_size` is size · scale, rounded.

    With it, and `fix_start`, symbolic sizes get numbers for positions and margins, which hold for all sizes of one
    remainder. As symbols they would grow from layer to layer: nested fractions that Inductor takes very long to
    simplify.
    """
    fix_start = fix_start and out_size is None
    if out_size is None:
        out_size = [output_size(n, ratio, rounding) for n, ratio in zip(size, scale, strict=True)]
    axes = rows, columns = [ResizedAxis.of(size[d], out_size[d], scale[d], support[d], fix_start) for d in (0, 1)]
    key = tuple((*axis[2:5], axis.start - 2 * axis.numerator * axis.first(0)) for axis in axes)
    phases = rows.numerator * columns.numerator
    padding = _own_padding(axes, padding_mode) if phases == 1 else None
    return Plan((rows, columns), phases, key, padding_mode, padding)


def _own_padding(axes: Sequence[ResizedAxis], padding_mode: str) -> tuple[int, int] | None:
    """The padding with which a convolution reads the same neighbours; None if there is none."""
    padding = rows, columns = -axes[0].first(0), -axes[1].first(0)
    if padding_mode != "zeros" or min(padding) < 0:
        return None
    for axis, pad in zip(axes, padding, strict=True):
        if not 0 <= 2 * pad - axis.support + 1 + axis.start < axis.denominator:  # its output has another size
            return None
    return rows, columns
