"""What pictures show of a layer: its kernels, the elements that they are made of, and numbers about its geometry.

A layer describes this as plain tensors. `inspect/` draws it, for every method in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Elements", "Form", "Quantity", "ShownKernels", "one_per_output", "parameter_quantities"]

#: the outline of an element: where it reaches; points reach nowhere
Form = Literal["ellipse", "diamond", "box", "point"]


@dataclasses.dataclass(frozen=True)
class Elements:
    """Elements of kernels, drawn over them.

    Attributes:
        position: (C, m, D), or (1, m, D) for all channels: where elements are, in pixels from the first pixel's centre.
        form: how the outline of an element is drawn.
        reach: like position: from the middle of the outline to its edge, in pixels; None for points.
        angle: (C, m) or (1, m): outlines are turned by it, in radians from the rows' axis to the columns'; None for
            0.
        weight: (C, m): elements with larger absolute weights are drawn larger; None if they have none of their own.
        label: what a picture calls them.
    """

    position: Tensor
    form: Form = "point"
    reach: Tensor | None = None
    angle: Tensor | None = None
    weight: Tensor | None = None
    label: str = "element"


@dataclasses.dataclass(frozen=True)
class ShownKernels:
    """Kernels to draw, one for each output channel.

    Attributes:
        values: (C, *size), one channel of the input each, as `one_per_output` chooses it.
        spacing: pixels from one sample to the next; below 1 for kernels that are sampled finely.
        elements: what the kernels are made of; None if there is nothing to draw over them.
    """

    values: Tensor
    spacing: float = 1.0
    elements: Elements | None = None


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Numbers about a layer's geometry, whose distribution a picture shows for every layer.

    Attributes:
        name: what they are, as "σ of elements".
        unit: of the numbers, as "pixels"; "" for none.
        values: (N, D): N numbers (D = 1), or N vectors, which are shown by their lengths.
        source: the paper's figure that shows the same; "" if there is none.
    """

    name: str
    unit: str
    values: Tensor
    source: str = ""


def one_per_output(kernels: Tensor) -> Tensor:
    """The kernel of one input channel for each output channel c: input channel c modulo C_in/groups.

    Args:
        kernels: (C_out, C_in/groups, ...).

    Returns:
        (C_out, ...).
    """
    channels = torch.arange(kernels.shape[0], device=kernels.device)
    return kernels[channels, channels % kernels.shape[1]]


def parameter_quantities(geometry: Mapping[str, Tensor]) -> tuple[Quantity, ...]:
    """One quantity for each geometry parameter, as its values are."""
    return tuple(Quantity(name, "", value.detach().reshape(-1, 1)) for name, value in geometry.items())
