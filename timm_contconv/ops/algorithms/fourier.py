"""The geometry of a convolution by discrete Fourier transforms."""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

from ..problem import Problem, output_size

__all__ = ["Axis", "axes_of"]


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


def axes_of(problem: Problem) -> list[Axis]:
    sizes = zip(problem.input_size, problem.kernel_size, problem.stride, problem.padding, strict=True)
    return [Axis.of(*axis) for axis in sizes]
