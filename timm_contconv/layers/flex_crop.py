"""Which part of a masked kernel is not zero, and convolving with that part alone.

A crop is (first, last + 1) per spatial dimension, in pixels of the whole kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType

from torch import Tensor
from torch.nn import functional as F

from .flex_grid import Axis

__all__ = ["Crop", "crop_to_mask", "is_inside", "margins", "pad_to_crop", "slices", "visible", "whole"]

Crop = tuple[tuple[int, int], ...]

COARSENESS = 16  # crops grow and shrink by this part of the kernel, so that there are few sizes
ROUNDING = 1e-3  # pixels; the mask itself is evaluated in float32


def whole(kernel_size: Sequence[int]) -> Crop:
    """The crop that cuts nothing away."""
    return tuple((0, size) for size in kernel_size)


def visible(
    mean: Sequence[float], sigma: Sequence[float], axes: Sequence[Axis], threshold: float, margin: float = 0.0
) -> Crop:
    """The pixels where a Gaussian mask reaches the threshold along each axis; at least one.

    Args:
        mean, sigma: of the mask, one per dimension; the kernel spans -1 to 1.
        axes: of the whole kernel.
        threshold: between 0 and 1.
        margin: what the mask may grow by, on either side, in the unit of the mean.
    """
    deviations = math.sqrt(-2 * math.log(threshold))
    crop = []
    for middle, width, axis in zip(mean, sigma, axes, strict=True):
        reach = abs(width) * deviations + margin
        first = math.ceil(axis.centre + (middle - reach) * axis.half - ROUNDING)
        last = math.floor(axis.centre + (middle + reach) * axis.half + ROUNDING)
        if first > last:  # between two pixels
            first, last = last, first
        crop.append((min(max(first, 0), axis.size - 1), max(min(last, axis.size - 1), 0) + 1))
    return tuple(crop)


def crop_to_mask(
    mean: Sequence[float],
    sigma: Sequence[float],
    axes: Sequence[Axis],
    threshold: float,
    causal: bool = False,
    margin: float = 0.0,
) -> Crop:
    """`visible`, rounded outwards to one of few sizes: about 16 steps over the kernel.

    Steps count from the centre, or from the last pixel of a causal kernel.
    """
    crop = []
    for (first, end), axis in zip(visible(mean, sigma, axes, threshold, margin), axes, strict=True):
        size = axis.size
        step = max(1, (size - 1) // COARSENESS)
        origin = size - 1 if causal else (size - 1) // 2
        low = origin + step * math.floor((first - origin) / step)
        high = origin + step * math.ceil((end - 1 - origin) / step)
        crop.append((max(low, 0), min(high + 1, size)))
    return tuple(crop)


def is_inside(inner: Crop, outer: Crop) -> bool:
    """Whether a crop lies in another one."""
    return all(a <= first and end <= b for (first, end), (a, b) in zip(inner, outer, strict=True))


def margins(crop: Crop, kernel_size: Sequence[int]) -> list[tuple[int, int]]:
    """What a crop cuts away before and after, per dimension."""
    return [(first, size - end) for (first, end), size in zip(crop, kernel_size, strict=True)]


def slices(crop: Sequence[tuple[int, int]]) -> tuple[slice | EllipsisType, ...]:
    """An index that takes a crop out of the last dimensions of a tensor."""
    return (..., *(slice(first, end) for first, end in crop))


def pad_to_crop(x: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros before and after each spatial dimension of x; a negative number of them cuts."""
    if any(max(side) > 0 for side in sides):
        x = F.pad(x, [max(amount, 0) for side in reversed(sides) for amount in side])
    for dim, (before, after) in enumerate(sides, start=-len(sides)):
        if min(before, after) < 0:
            first, removed = max(-before, 0), max(-before, 0) + max(-after, 0)
            x = x.narrow(dim, first, x.shape[dim] - removed)
    return x
