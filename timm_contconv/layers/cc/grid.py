"""The projected grid of CC layers and its neighbours (Shocher et al. 2020, Blocks 1 and 2), in exact integers.

A scale is a fraction p/q. So every position on the projected grid is a multiple of 1/(2p), and a position halfway
between two pixels does not depend on floating-point rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Ratio",
    "ResizedAxis",
    "Rounding",
    "Scale",
    "distances",
    "initial_scale",
    "is_upscaling",
    "neighbours",
    "output_size",
    "phase_plateaus",
    "plateaus",
    "ratios",
    "resized_axes",
    "scale_of",
    "scale_text",
]

Scale = float | Fraction | Sequence[float | Fraction]
Rounding = Literal["ceil", "floor", "round"]
#: numerator and denominator of a scale
Ratio = tuple[int, int]

#: a scale becomes the nearest fraction with at most this denominator, less than 1e-12 away
LARGEST_DENOMINATOR = 10**6
#: bounds on a scale
SMALLEST_SCALE, LARGEST_SCALE = Fraction(1, 256), Fraction(256)
#: size of the images in `resized_axes`, in denominators; only the remainder of size · scale matters
MULTIPLE = 4


class ResizedAxis(NamedTuple):
    """How one spatial dimension is resized.

    Attributes:
        size, out_size: pixels before and after.
        numerator, denominator: p and q of the scale p/q, in lowest terms. The distances to the neighbours repeat
            every p output pixels.
        support: pixels that the kernel covers.
        start: position of the first output pixel, as `position`.
    """

    size: int
    out_size: int
    numerator: int
    denominator: int
    support: int
    start: int

    @classmethod
    def of(cls, size: int, out_size: int, ratio: Ratio, support: int, fix_start: bool = False) -> ResizedAxis:
        """The axis of a scale, numerator and denominator, with the centres of both images in one place.

        Args:
            fix_start: of a symbolic size, let the start be a number. If the output's size is size · scale, rounded, the
                start depends on the remainder of size · numerator / denominator alone.
        """
        numerator, denominator = ratio
        start = numerator * (size - 1) - denominator * (out_size - 1)
        return cls(size, out_size, numerator, denominator, support, operator.index(start) if fix_start else start)

    def position(self, n: int) -> int:
        """2p · g_n of the paper's Eq. 2: the position of output pixel n in the input, in units of 1/(2p) pixels."""
        return 2 * n * self.denominator + self.start

    def first(self, n: int) -> int:
        """The first of the `support` neighbours of output pixel n: ceil(g_n - support/2)."""
        return -((self.numerator * self.support - self.position(n)) // (2 * self.numerator))

    def margins(self) -> tuple[int, int]:
        """How far neighbours lie outside the input, before and after it, in pixels; negative if all lie inside."""
        # Both images have one centre: the last output pixel lies as far before the input's end as the first behind its
        # start.
        last = (self.numerator * self.support + self.start) // (2 * self.numerator)
        return -self.first(0), self.support - 1 - last


def neighbours(axis: ResizedAxis, start: int, stop: int, device: torch.device | None = None) -> Tensor:
    """Neighbours of output pixels start..stop-1 (Block 2).

    Returns:
        (stop - start, support) indices of input pixels; negative or too large beyond the borders.
    """
    position = _positions(axis, start, stop, device)
    first = -torch.div(axis.numerator * axis.support - position, 2 * axis.numerator, rounding_mode="floor")
    return first.unsqueeze(1) + torch.arange(axis.support, device=device)


def distances(axis: ResizedAxis, start: int, stop: int, device: torch.device | None = None) -> Tensor:
    """Distances g - m of output pixels start..stop-1 from their neighbours, (stop - start, support), in float64."""
    position, unit = _positions(axis, start, stop, device), 2 * axis.numerator
    return (position.unsqueeze(1) - unit * neighbours(axis, start, stop, device)).double() / unit


def _positions(axis: ResizedAxis, start: int, stop: int, device: torch.device | None) -> Tensor:
    """`ResizedAxis.position` of output pixels start..stop-1."""
    return 2 * axis.denominator * torch.arange(start, stop, device=device) + axis.start


def resized_axes(scale: Ratio, support: int, rounding: Rounding) -> list[ResizedAxis]:
    """Axes at a scale p/q: a size that is a multiple of q, and, of scale 1/q, a neighbouring one with another parity.

    At scales 1/q and p they have all distances that occur at any size.
    """
    numerator, denominator = scale
    beside = 1 if rounding == "floor" else -1
    sizes = [MULTIPLE * denominator]
    if numerator == 1 < denominator:
        sizes.append(MULTIPLE * denominator + beside)
    return [ResizedAxis.of(size, output_size(size, scale, rounding), scale, support) for size in sizes]


def plateaus(scale: Ratio, support: int, rounding: Rounding) -> list[tuple[float, float]]:
    """Lowest and highest distance of each pixel of a kernel, in the pixels' order.

    At scales 1/k these are the distances that occur; at other scales the pixels have a distance of one.
    """
    if scale[0] > 1:
        return [((support - 1) / 2 - pixel,) * 2 for pixel in range(support)]
    axes = resized_axes(scale, support, rounding)
    rows = [distances(axis, 0, 1, torch.device("cpu"))[0].tolist() for axis in axes]
    return [(min(ends), max(ends)) for ends in zip(*rows, strict=True)]


def phase_plateaus(scale: Ratio, support: int, rounding: Rounding) -> list[tuple[float, float]]:
    """At an integer scale, all distances that occur as plateaus of their own, falling."""
    (axis,) = resized_axes(scale, support, rounding)
    found = distances(axis, 0, axis.numerator, torch.device("cpu")).flatten().tolist()
    return [(distance, distance) for distance in sorted(found, reverse=True)]


def output_size(size: int, ratio: Ratio, rounding: Rounding) -> int:
    """Size of the output: size · scale, rounded to whole pixels; at least one."""
    p, q = ratio
    if rounding == "ceil":
        pixels = -(-size * p // q)
    elif rounding == "floor":
        pixels = size * p // q
    else:
        pixels = (2 * size * p + q) // (2 * q)
    return max(pixels, 1)


def ratios(name: str, value: Scale) -> tuple[Ratio, Ratio]:
    """One scale for both dimensions, or one for each, as fractions in lowest terms.

    Raises:
        ValueError: not a number from 1/256 to 256, or not two of them.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{name}={value!r}: expected a number, or one for each of two dimensions")
        return _ratio(f"{name}[0]", value[0]), _ratio(f"{name}[1]", value[1])
    ratio = _ratio(name, value)
    return ratio, ratio


def _ratio(name: str, value: float | Fraction) -> Ratio:
    try:
        exact = Fraction(value if isinstance(value, int | Fraction) else float(value))
        scale = exact.limit_denominator(LARGEST_DENOMINATOR)
    except (TypeError, ValueError, OverflowError):
        scale = Fraction(0)
    if isinstance(value, bool | str) or not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"{name}={value!r}: expected a number from 1/256 to 256, or one for each of two dimensions")
    return scale.numerator, scale.denominator


def initial_scale(stride: tuple[int, ...], scale: Scale | None) -> tuple[Ratio, Ratio]:
    """The scale of a new layer: the given one, or 1/stride.

    Raises:
        ValueError: both are given, or one is out of range.
    """
    if scale is None:
        if max(stride) * SMALLEST_SCALE > 1:
            raise ValueError(f"stride={stride}: expected at most {1 / SMALLEST_SCALE}; the layer's scale is 1/stride")
        return (1, stride[0]), (1, stride[1])
    if max(stride) > 1:
        raise ValueError(f"stride={stride}, scale={scale!r}: expected one of them; a scale is 1/stride")
    return ratios("scale", scale)


def is_upscaling(scale: Sequence[Ratio]) -> bool:
    """Whether a scale is an integer along both axes, and more than 1 along one."""
    return all(denominator == 1 for _, denominator in scale) and max(p for p, _ in scale) > 1


def scale_of(size: Sequence[int], scale: Scale | None, out_size: Sequence[int] | None) -> tuple[Ratio, Ratio] | None:
    """The scale of a call that gives one, or the size of the output; None otherwise. Errors as `ratios`."""
    if scale is not None:
        return ratios("scale", scale)
    return None if out_size is None else (_ratio_of(out_size[0], size[0]), _ratio_of(out_size[1], size[1]))


def _ratio_of(after: int, before: int) -> Ratio:
    """The ratio of two sizes in lowest terms."""
    divisor, rest = after, before
    while rest:  # not math.gcd: torch.compile can't trace it with dynamic sizes
        divisor, rest = rest, divisor % rest
    return after // divisor, before // divisor


def scale_text(scale: Sequence[Ratio]) -> str:
    """A scale for messages: "1/2", or "1/2×1" where rows and columns differ."""
    return "×".join(str(Fraction(*ratio)) for ratio in dict.fromkeys(scale))
