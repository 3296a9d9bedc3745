"""Depthwise convolution by real FFTs."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .algorithm import Algorithm
from .problem import Problem, compute_dtype, new_tensor, output_size

__all__ = [
    "FFT",
    "Axis",
    "axes_of",
    "fast_length",
    "gradient_spectrum",
    "image_spectrum",
    "inverse",
    "spatial",
    "transform",
]

# Spectra are made for a share of the images and channels at a time, so that with three or four of them alive the
# backward stays under three activations; below the minimum the calls would cost more than the work.
_CHUNK_SHARE = 8
_CHUNK_MINIMUM = 1 << 17


@lru_cache(maxsize=1024)
def fast_length(n: int) -> int:
    """The smallest length of at least n whose prime factors are 2, 3, 5 and 7 only."""
    return next(length for length in itertools.count(max(n, 1)) if math.gcd(210**32, length) == length)


@dataclass(frozen=True)
class Axis:
    """One spatial axis: the taps that meet the image, and the shortest circular line on which nothing collides.

    The image stands at `left` .. `left + size` of the line. Tap t of `taps` meets output i at place
    `stride * i + t`. What runs past the end of the line wraps into the empty `left` places at its start.
    """

    size: int
    stride: int
    left: int
    first_tap: int
    taps: int
    outputs: int
    shortest: int

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, padding: int) -> "Axis":
        outputs = output_size([size], [kernel], [stride], [padding])[0]
        reach = (outputs - 1) * stride
        first = min(max(0, padding - reach), kernel - 1)
        taps = max(1, min(kernel, size + padding) - first)
        left = padding - first
        return cls(size, stride, left, first, taps, outputs, max(size + left, taps, reach + 1))

    @property
    def length(self) -> int:
        """A length of at least `shortest` that FFTs are fast at."""
        return fast_length(self.shortest)


def axes_of(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[Axis]:
    return [Axis.of(*axis) for axis in zip(size, kernel, stride, padding, strict=True)]


def _dims(axes: list[Axis]) -> list[int]:
    return list(range(-len(axes), 0))


def spatial(slices: Sequence[slice]) -> Any:
    """Index of the last dimensions; Any, because PyTorch's stubs do not know tuples with an ellipsis."""
    return (..., *slices)


def transform(x: Tensor, axes: list[Axis]) -> Tensor:
    return torch.fft.rfftn(x, [a.length for a in axes], _dims(axes))


def inverse(spectrum: Tensor, axes: list[Axis]) -> Tensor:
    return torch.fft.irfftn(spectrum, [a.length for a in axes], _dims(axes))


def image_spectrum(x: Tensor, axes: list[Axis]) -> Tensor:
    pad = [side for a in reversed(axes) for side in (a.left, a.length - a.left - a.size)]
    return transform(F.pad(x.to(compute_dtype(x.dtype)), pad), axes)


def gradient_spectrum(grad: Tensor, axes: list[Axis]) -> Tensor:
    grad = grad.to(compute_dtype(grad.dtype))
    if any(a.stride > 1 for a in axes):
        spread = grad.new_zeros((*grad.shape[: -len(axes)], *((a.outputs - 1) * a.stride + 1 for a in axes)))
        spread[spatial([slice(None, None, a.stride) for a in axes])] = grad
        grad = spread
    return transform(grad, axes)


def _weight_spectrum(weight: Tensor, axes: list[Axis]) -> Tensor:
    used = weight[:, 0][spatial([slice(a.first_tap, a.first_tap + a.taps) for a in axes])]
    return transform(used.to(compute_dtype(weight.dtype)), axes)


def _chunks(batch: int, channels: int, axes: list[Axis]) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the channels, each with slices of the batch."""
    plane = math.prod(a.length for a in axes)
    budget = max(_CHUNK_MINIMUM, batch * channels * plane // _CHUNK_SHARE)
    width = min(channels, max(1, budget // (batch * plane)))
    height = min(batch, max(1, budget // (width * plane)))
    rows = [slice(n, n + height) for n in range(0, batch, height)]
    for c in range(0, channels, width):
        yield slice(c, c + width), rows


class FFT(Algorithm):
    """Products of spectra, at lengths just large enough that what wraps around is never read.

    Spectra are conjugated physically: a lazy conjugate is not resolved inside a custom operator, below the
    dispatch key that would do it.
    """

    name = "fft"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        return None

    def features(self, pass_: str, problem: Problem) -> tuple[float, ...]:
        sizes = (problem.input_size, problem.kernel_size, problem.stride, problem.padding)
        plane = math.prod(a.length for a in axes_of(*sizes))
        work = problem.channels * plane
        images = problem.batch * work
        return (1.0, images * math.log2(plane), images, work * math.log2(plane), problem.elements)

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        axes = axes_of(x.shape[2:], weight.shape[2:], stride, padding)
        out = new_tensor(x, (*x.shape[:2], *(a.outputs for a in axes)))
        wanted = spatial([slice(0, (a.outputs - 1) * a.stride + 1, a.stride) for a in axes])
        for c, rows in _chunks(x.shape[0], x.shape[1], axes):
            kernel = _weight_spectrum(weight[c], axes).conj_physical_()
            for n in rows:
                out[n, c] = inverse(image_spectrum(x[n, c], axes).mul_(kernel), axes)[wanted]
        return out if bias is None else out.add_(bias.reshape(-1, *[1] * len(axes)))

    def input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        axes = axes_of(input_size, weight.shape[2:], stride, padding)
        out = new_tensor(grad, (*grad.shape[:2], *input_size))
        wanted = spatial([slice(a.left, a.left + a.size) for a in axes])
        for c, rows in _chunks(grad.shape[0], grad.shape[1], axes):
            kernel = _weight_spectrum(weight[c], axes)
            for n in rows:
                out[n, c] = inverse(gradient_spectrum(grad[n, c], axes).mul_(kernel), axes)[wanted]
        return out

    def weight(
        self, grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        axes = axes_of(x.shape[2:], kernel_size, stride, padding)
        out = x.new_zeros((x.shape[1], 1, *kernel_size))
        used = spatial([slice(a.first_tap, a.first_tap + a.taps) for a in axes])
        wanted = spatial([slice(0, a.taps) for a in axes])
        for c, rows in _chunks(x.shape[0], x.shape[1], axes):
            products = [
                image_spectrum(x[n, c], axes).mul_(gradient_spectrum(grad[n, c], axes).conj_physical_()).sum(0)
                for n in rows
            ]
            out[c, 0][used] = inverse(torch.stack(products).sum(0), axes)[wanted].to(out.dtype)
        return out
