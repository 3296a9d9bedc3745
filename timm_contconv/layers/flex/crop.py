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

__all__ = ["Crop", "MaskValues", "margins_of_mask", "read_mask"]

#: mean and sigma of a mask, one number per dimension each, and the angle if there is one
MaskValues = tuple[list[float], ...]

COARSENESS_COMPILED = 6  # the same in compiled training, where a new size compiles the model again
COARSENESS = 16  # crops grow and shrink by 1/16 of the kernel, so that there are few sizes
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


def margins_of_mask(
    values: MaskValues, axes: Sequence[KernelAxis], threshold: float, causal: bool, coarseness: int = COARSENESS
) -> Margins:
    """What may be left out of a kernel: pixels where a Gaussian mask is below the threshold along an axis.

    At least one pixel stays. The part that stays is rounded up to one of few sizes: the kernel has about `coarseness`
    steps, which count from the centre, or from the last pixel of a causal kernel.

    Args:
        values: of the mask; the kernel spans -1 to 1.
        axes: of the kernel.
        threshold: between 0 and 1.
        causal: as for `Kernel`.
        coarseness: steps of the kernel.
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
        step = max(1, (axis.size - 1) // coarseness)
        origin = axis.size - 1 if causal else (axis.size - 1) // 2
        low = origin + step * math.floor((first - origin) / step)
        high = origin + step * math.ceil((last - origin) / step)
        margins.append((max(low, 0), max(axis.size - 1 - high, 0)))
    return tuple(margins)


def _visible(middle: float, reach: float, axis: KernelAxis) -> tuple[int, int]:
    """The first and the last pixel within `reach` of `middle`; at least one."""
    low, high = (axis.centre + (middle + side * reach) * axis.half for side in (-1, 1))
    first = math.ceil(min(max(low - ROUNDING, -1), axis.size))
    last = math.floor(min(max(high + ROUNDING, -1), axis.size))
    first, last = min(first, last), max(first, last)  # a mask between two pixels gives them in reverse
    return min(max(first, 0), axis.size - 1), min(max(last, 0), axis.size - 1)
