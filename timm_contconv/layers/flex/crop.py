"""The margins of a masked kernel, and the mask that they were found for.

Margins are zero pixels before and after the kernel, per spatial dimension. The convolution leaves them out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.kernel import Margins
from .grid import KernelAxis

__all__ = ["Crop", "MaskValues", "margins_of_mask", "margins_of_part", "part_within", "read_mask"]

#: mean and sigma of a mask, one number per dimension each, and the angle if there is one
MaskValues = tuple[list[float], ...]

COARSENESS = 16  # crops grow and shrink by 1/16 of the kernel, so that there are few sizes
PARTS = 4  # those of compiled training by quarters, because every new size compiles the model again
ROUNDING = 1e-3  # pixels; the mask itself is evaluated in float32


def read_mask(mask: Sequence[Tensor]) -> MaskValues:
    """The parameters of a mask as numbers; waits for an accelerator."""
    numbers = iter(torch.cat([value.detach() for value in mask]).tolist())
    return tuple(list(itertools.islice(numbers, len(value))) for value in mask)


@dataclasses.dataclass(frozen=True, eq=False)
class Crop:
    """Margins, and the mask that they were found for.

    Attributes:
        margins: what the mask leaves out.
        values: of the mask.
        tensors: the mask's parameters on an accelerator, where values are not compared; () on the CPU.
        versions: of the tensors; PyTorch counts every edit in place, except through `.data`.
    """

    margins: Margins
    values: MaskValues
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, margins: Margins, values: MaskValues, mask: Sequence[Tensor]) -> Crop:
        known = tuple(value for value in mask if value.device.type != "cpu" and not value.is_inference())
        return cls(margins, values, known, tuple(value._version for value in known))

    def is_of(self, mask: Sequence[Tensor]) -> bool:
        """Whether the margins are still those of this mask. Does not wait for an accelerator."""
        if mask[0].device.type == "cpu":
            return read_mask(mask) == self.values
        if len(self.tensors) != len(mask):
            return False
        known = zip(mask, self.tensors, self.versions, strict=True)
        return all(now is then and now._version == version for now, then, version in known)


def margins_of_mask(values: MaskValues, axes: Sequence[KernelAxis], threshold: float, causal: bool) -> Margins:
    """What may be left out of a kernel: pixels where a Gaussian mask is below the threshold along an axis.

    At least one pixel stays. The part that stays is rounded up to one of few sizes: the kernel has about `COARSENESS`
    steps, which count from the centre, or from the last pixel of a causal kernel.

    Args:
        values: of the mask; the kernel spans -1 to 1.
        axes: of the kernel.
        threshold: between 0 and 1.
        causal: as for `Kernel`.
    """
    deviations = math.sqrt(-2 * math.log(threshold))
    means, sigmas, *angles = values
    widths = [abs(sigma) * deviations for sigma in sigmas]
    if angles:  # the box around a turned box
        cosine, sine = abs(math.cos(angles[0][0])), abs(math.sin(angles[0][0]))
        widths = [cosine * widths[0] + sine * widths[1], sine * widths[0] + cosine * widths[1]]
    margins = []
    for middle, width, axis in zip(means, widths, axes, strict=True):
        first, last = _visible(middle, width, axis)
        step = max(1, (axis.size - 1) // COARSENESS)
        origin = _origin(axis, causal)
        low = origin + step * math.floor((first - origin) / step)
        high = origin + step * math.ceil((last - origin) / step)
        margins.append((max(low, 0), max(axis.size - 1 - high, 0)))
    return tuple(margins)


def part_within(margins: Margins, axes: Sequence[KernelAxis], causal: bool) -> float:
    """How far a kernel without its margins reaches, as a part of how far the whole one does, 0 to 1.

    Counted from the centre, or from the last pixel of a causal kernel, along the axis where it is most.

    Args:
        margins: pixels before and after, per dimension.
        axes: of the kernel.
        causal: as for `Kernel`.
    """
    parts = []
    for (before, after), axis in zip(margins, axes, strict=True):
        origin = _origin(axis, causal)
        reach = max(origin - before, axis.size - 1 - after - origin)
        parts.append(reach / max(origin, axis.size - 1 - origin, 1))
    return max(parts)


def margins_of_part(part: float, axes: Sequence[KernelAxis], causal: bool) -> Margins:
    """What may be left out of a kernel of which this part is wanted, rounded up to a quarter; at least one is kept.

    Args:
        part: 0 to 1, as from `part_within`.
        axes: of the kernel.
        causal: as for `Kernel`.

    Returns:
        Pixels before and after, per dimension.
    """
    part = max(math.ceil(part * PARTS), 1) / PARTS
    margins = []
    for axis in axes:
        origin = _origin(axis, causal)
        after = axis.size - 1 - origin
        reach = math.ceil(part * max(origin, after))
        margins.append((max(origin - reach, 0), max(after - reach, 0)))
    return tuple(margins)


def _origin(axis: KernelAxis, causal: bool) -> int:
    """The pixel from which the sizes of crops count."""
    return axis.size - 1 if causal else (axis.size - 1) // 2


def _visible(middle: float, reach: float, axis: KernelAxis) -> tuple[int, int]:
    """The first and the last pixel within `reach` of `middle`; at least one."""
    low, high = (axis.centre + (middle + side * reach) * axis.half for side in (-1, 1))
    first = math.ceil(min(max(low - ROUNDING, -1), axis.size))
    last = math.floor(min(max(high + ROUNDING, -1), axis.size))
    first, last = min(first, last), max(first, last)  # a mask between two pixels gives them in reverse
    return min(max(first, 0), axis.size - 1), min(max(last, 0), axis.size - 1)
