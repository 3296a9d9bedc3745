"""Convolution by real FFTs, for any groups.

The spectra of kernels between channels are many times as large as kernels, so they exist for a block of channels at a
time. All spectra are laid out as (groups, rows, columns, *frequencies), where rows and columns are images and channels
of a group, in an order that makes every pass a matrix product per frequency.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem, compute_dtype, new_tensor
from .fourier import Axis, Fourier, Places, axes_of, used_taps

__all__ = ["FFT"]

# Bytes of the spectra of a block: of its kernels, and of the images before or behind them. An eighth of all of them
# keeps the backward under three activations; below the least the calls would cost more than the work.
_LEAST_BYTES, _MOST_BYTES, _SHARE = 1 << 19, 1 << 23, 8


class FFT(Fourier):
    """Transforms by PyTorch's FFT.

    Spectra are conjugated physically: a lazy conjugate is not resolved inside a custom operator, below the
    dispatch key that would do it.
    """

    name = "fft"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        return None

    def filtered(
        self, problem: Problem, images: Tensor, kernels: Tensor, places: Places, wanted: Places, conjugate: bool
    ) -> Tensor:
        axes, (groups, c_from, c_to) = axes_of(problem), kernels.shape[:3]
        out = new_tensor(images, (problem.batch, groups * c_to, *map(len, wanted)))
        sources, targets, taps = _grouped(images, problem), _grouped(out, problem), used_taps(kernels, axes)
        for group, blocks in _blocks((groups, c_to), c_from + problem.batch, axes):
            spectra = _spectrum(sources[group], places, axes)
            for block in blocks:
                filters = _spectrum(taps[group, :, block], _taps(axes), axes)
                filters = filters.conj_physical_() if conjugate else filters
                targets[group, :, block] = _values(_product(spectra, filters), wanted, axes)
        return out

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        axes, out = axes_of(problem), x.new_zeros(problem.weight_shape)
        grads, images = _grouped(grad, problem), _grouped(x, problem)
        taps = used_taps(out.unflatten(0, (problem.groups, -1)), axes)
        for group, blocks in _blocks(taps.shape[:2], taps.shape[2] + problem.batch, axes):
            spectra = _spectrum(images[group], [a.pixels for a in axes], axes)
            for block in blocks:
                factors = _spectrum(grads[group, :, block], [a.places for a in axes], axes).conj_physical_()
                taps[group, block] = _values(_product(factors.transpose(1, 2), spectra), _taps(axes), axes)
        return out


# -------------------------------------------------------------------------------------- images and kernels


def _grouped(images: Tensor, problem: Problem) -> Tensor:
    """(N, C, *size) as (groups, N, C/groups, *size)."""
    return images.unflatten(1, (problem.groups, -1)).transpose(0, 1)


def _taps(axes: Sequence[Axis]) -> list[range]:
    """Where the taps of kernels stand."""
    return [range(a.taps) for a in axes]


def _blocks(channels: Sequence[int], spectra: int, axes: Sequence[Axis]) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the groups, each with slices of its channels.

    Args:
        channels: the number of groups, and of the channels of each.
        spectra: how many spectra there are for a channel.
        axes: the spatial axes.
    """
    groups, width = channels
    size = 4 * spectra * math.prod(a.length for a in axes)
    count = max(1, min(max(groups * width * size // _SHARE, _LEAST_BYTES), _MOST_BYTES) // size)
    blocks = [slice(first, first + count) for first in range(0, width, count)]
    for first in range(0, groups, max(1, count // width)):
        yield slice(first, first + max(1, count // width)), blocks


# ----------------------------------------------------------------------------------------------- transforms


def _spectrum(x: Tensor, places: Places, axes: Sequence[Axis]) -> Tensor:
    """The spectrum of what stands at these places of the axes, which are the last dimensions."""
    x, lengths = x.to(compute_dtype(x.dtype)), [a.length for a in axes]
    if any(p.start or p.step > 1 for p in places):
        line = x.new_zeros((*x.shape[: -len(axes)], *lengths))
        line[_at(places)] = x
        x = line
    return torch.fft.rfftn(x, lengths, _dims(axes))


def _values(spectrum: Tensor, wanted: Places, axes: Sequence[Axis]) -> Tensor:
    """The inverse of `_spectrum`."""
    return torch.fft.irfftn(spectrum, [a.length for a in axes], _dims(axes))[_at(wanted)]


def _dims(axes: Sequence[Axis]) -> list[int]:
    return list(range(-len(axes), 0))


def _at(places: Places) -> Any:
    """Index of the last dimensions; Any, because PyTorch's stubs do not know tuples with an ellipsis."""
    return (..., *(slice(p.start, p.stop, p.step) for p in places))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product per frequency of (groups, A, S, *frequencies) and (groups, S, B, *frequencies)."""
    if left.shape[2] == 1:
        return left * right
    if left.shape[1] == right.shape[2] == 1:
        return (left.transpose(1, 2) * right).sum(1, keepdim=True)
    products = left.flatten(3).movedim(-1, 1) @ right.flatten(3).movedim(-1, 1)
    return products.movedim(1, -1).unflatten(-1, left.shape[3:])
