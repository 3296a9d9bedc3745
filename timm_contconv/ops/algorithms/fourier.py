"""What convolutions by discrete Fourier transforms share: their geometry, and two passes that are one filter."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from ..problem import Problem, output_size
from .algorithm import Algorithm, add_bias

__all__ = ["Axis", "Fourier", "Places", "axes_of", "used_taps"]

#: Where on each axis the pixels of an image stand.
Places = Sequence[range]


@lru_cache(maxsize=1024)
def _fast_length(n: int) -> int:
    """The smallest length of at least n whose prime factors are 2, 3, 5 and 7 only."""
    return next(length for length in itertools.count(max(n, 1)) if math.gcd(210**32, length) == length)


class Axis(NamedTuple):
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
        return _fast_length(self.shortest)

    @property
    def pixels(self) -> range:
        """Where the pixels of the image stand."""
        return range(self.left, self.left + self.size)

    @property
    def places(self) -> range:
        """Where the outputs stand."""
        return range(0, self.outputs * self.stride, self.stride)

    @property
    def used(self) -> slice:
        """The taps that meet the image."""
        return slice(self.first_tap, self.first_tap + self.taps)


@lru_cache(maxsize=1024)
def axes_of(problem: Problem) -> tuple[Axis, ...]:
    sizes = zip(problem.input_size, problem.kernel_size, problem.stride, problem.padding, strict=True)
    return tuple(Axis.of(*axis) for axis in sizes)


def used_taps(kernels: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The taps that meet the image; the last dimensions are spatial."""
    index: Any = (..., *(a.used for a in axes))
    return kernels[index]


class Fourier(Algorithm):
    """Products of spectra, at lengths just large enough that what wraps around is never read."""

    spreads_nan = True

    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        axes, kernels = axes_of(problem), weight.unflatten(0, (problem.groups, -1)).transpose(1, 2)
        places = [a.pixels for a in axes], [a.places for a in axes]
        return add_bias(self.filtered(problem, x, kernels, *places, conjugate=True), bias)

    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        axes, kernels = axes_of(problem), weight.unflatten(0, (problem.groups, -1))
        places = [a.places for a in axes], [a.pixels for a in axes]
        return self.filtered(problem, grad, kernels, *places, conjugate=False)

    @abstractmethod
    def filtered(
        self, problem: Problem, images: Tensor, kernels: Tensor, places: Places, wanted: Places, conjugate: bool
    ) -> Tensor:
        """What stands at the `wanted` places, (N, groups * C', *sizes), after images are multiplied with kernels.

        Args:
            problem: of which it is a pass.
            images: (N, groups * C, *sizes).
            kernels: (groups, C, C', *kernel).
            places: where the pixels of the images stand, by axis.
            wanted: where those of the result stand.
            conjugate: conjugates the kernels' spectra for a correlation, as convolutions of networks are.
        """
