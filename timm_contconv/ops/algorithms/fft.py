"""Convolution by real FFTs, for any groups.

The spectra of kernels between channels are many times as large as kernels, so they exist for a block of channels at a
time. All spectra are laid out as (groups, rows, columns, *frequencies), where rows and columns are images and channels
of a group, in an order that makes every pass a matrix product per frequency.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Problem, compute_dtype, new_tensor
from .algorithm import Algorithm, add_bias
from .axis import Axis, axes_of

__all__ = ["FFT"]

# Bytes of the spectra of a block: of its kernels, and of the images before or behind them. An eighth of all of them
# keeps the backward under three activations; below the least the calls would cost more than the work.
_LEAST_BYTES, _MOST_BYTES, _SHARE = 1 << 19, 1 << 23, 8


class FFT(Algorithm):
    """Products of spectra, at lengths just large enough that what wraps around is never read.

    Spectra are conjugated physically: a lazy conjugate is not resolved inside a custom operator, below the
    dispatch key that would do it.
    """

    name = "fft"
    spreads_nan = True

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        return None

    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        axes = axes_of(problem)
        out = new_tensor(x, problem.output_shape)
        images, kernels, outputs = _grouped(x, problem), _kernels(weight, problem, axes), _grouped(out, problem)
        wanted = [slice(0, (a.outputs - 1) * a.stride + 1, a.stride) for a in axes]
        for group, blocks in _blocks(kernels.shape[:2], kernels.shape[2] + problem.batch, axes):
            spectra = _image_spectrum(images[group], axes)
            for block in blocks:
                filters = _transform(kernels[group, block], axes).conj_physical_()
                outputs[group, :, block] = _inverse(_product(spectra, filters.transpose(1, 2)), axes, wanted)
        return add_bias(out, bias)

    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        axes = axes_of(problem)
        out = new_tensor(grad, problem.input_shape)
        grads, kernels, inputs = _grouped(grad, problem), _kernels(weight, problem, axes), _grouped(out, problem)
        wanted = [slice(a.left, a.left + a.size) for a in axes]
        for group, blocks in _blocks((problem.groups, kernels.shape[2]), kernels.shape[1] + problem.batch, axes):
            spectra = _gradient_spectrum(grads[group], axes)
            for block in blocks:
                filters = _transform(kernels[group, :, block], axes)
                inputs[group, :, block] = _inverse(_product(spectra, filters), axes, wanted)
        return out

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        axes = axes_of(problem)
        out = x.new_zeros(problem.weight_shape)
        grads, images, kernels = _grouped(grad, problem), _grouped(x, problem), _kernels(out, problem, axes)
        wanted = [slice(0, a.taps) for a in axes]
        for group, blocks in _blocks(kernels.shape[:2], kernels.shape[2] + problem.batch, axes):
            spectra = _image_spectrum(images[group], axes)
            for block in blocks:
                factors = _gradient_spectrum(grads[group, :, block], axes).conj_physical_()
                kernels[group, block] = _inverse(_product(factors.transpose(1, 2), spectra), axes, wanted)
        return out


# -------------------------------------------------------------------------------------- images and kernels


def _grouped(images: Tensor, problem: Problem) -> Tensor:
    """(N, C, *size) as (groups, N, C/groups, *size)."""
    return images.unflatten(1, (problem.groups, -1)).transpose(0, 1)


def _kernels(weight: Tensor, problem: Problem, axes: Sequence[Axis]) -> Tensor:
    """The taps that meet the image, (groups, C_out/groups, C_in/groups, *taps)."""
    return weight[_spatial([a.used for a in axes])].unflatten(0, (problem.groups, -1))


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


def _spatial(slices: Sequence[slice]) -> Any:
    """Index of the last dimensions; Any, because PyTorch's stubs do not know tuples with an ellipsis."""
    return (..., *slices)


def _dims(axes: Sequence[Axis]) -> list[int]:
    return list(range(-len(axes), 0))


def _transform(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    return torch.fft.rfftn(x.to(compute_dtype(x.dtype)), [a.length for a in axes], _dims(axes))


def _inverse(spectrum: Tensor, axes: Sequence[Axis], wanted: Sequence[slice]) -> Tensor:
    return torch.fft.irfftn(spectrum, [a.length for a in axes], _dims(axes))[_spatial(wanted)]


def _image_spectrum(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    pad = [side for a in reversed(axes) for side in (a.left, a.length - a.left - a.size)]
    return _transform(F.pad(x.to(compute_dtype(x.dtype)), pad), axes)


def _gradient_spectrum(grad: Tensor, axes: Sequence[Axis]) -> Tensor:
    if any(a.stride > 1 for a in axes):
        spread = grad.new_zeros((*grad.shape[: -len(axes)], *((a.outputs - 1) * a.stride + 1 for a in axes)))
        spread[_spatial([slice(None, None, a.stride) for a in axes])] = grad
        grad = spread
    return _transform(grad, axes)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product per frequency of (groups, A, S, *frequencies) and (groups, S, B, *frequencies)."""
    if left.shape[2] == 1:
        return left * right
    if left.shape[1] == right.shape[2] == 1:
        return (left.transpose(1, 2) * right).sum(1, keepdim=True)
    products = left.flatten(3).movedim(-1, 1) @ right.flatten(3).movedim(-1, 1)
    return products.movedim(1, -1).unflatten(-1, left.shape[3:])
