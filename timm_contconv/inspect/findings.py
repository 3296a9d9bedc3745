"""Findings: everything that a report says, before it becomes a page."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .images import Images
from .receptive_field import ReceptiveField
from .shown import ShownLayer
from .timing import ModelTime

__all__ = ["Findings", "LayerRow"]


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One row of the table of layers.

    Attributes:
        name: module name.
        label: a short name.
        before, after: the layers, as text; before is "" if nothing was replaced.
        parameters_before, parameters_after: numbers of parameters; before is None if nothing was replaced.
        multiply_adds_before, multiply_adds_after: for one sample; None if they are not known.
        receptive_field: pixels of the input that an output depends on, per spatial dimension.
        fit_error: ||new kernel - old kernel|| / ||old kernel|| at the start; None for a random start.
        seconds, share: measured time, and its part of the model's; None if nothing was measured.
        algorithm: the engine's; "" if nothing was measured.
    """

    name: str
    label: str
    before: str
    after: str
    parameters_before: int | None
    parameters_after: int
    multiply_adds_before: int | None
    multiply_adds_after: int | None
    receptive_field: tuple[int, ...] | None
    fit_error: float | None
    seconds: float | None
    share: float | None
    algorithm: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """What `tcc.inspect` found about a model.

    Attributes:
        title: the model's name.
        parameters_before, parameters_after: of the whole model; before is None for a model that was not patched.
        multiply_adds_before, multiply_adds_after: of the whole model for one sample; None if they are not known.
        rows: one per layer and other change.
        layers: what pictures show of each layer.
        time: of a forward pass; None without an input.
        images: what the model was run with; None if there were none.
        receptive_fields: by "start" and "now".
        activations: (heat, class) for each image, by "start" and "now".
        left_out: parts of the report that are left out, and why.
    """

    title: str
    parameters_before: int | None
    parameters_after: int
    multiply_adds_before: int | None
    multiply_adds_after: int | None
    rows: tuple[LayerRow, ...]
    layers: tuple[ShownLayer, ...]
    time: ModelTime | None
    images: Images | None
    receptive_fields: dict[str, ReceptiveField]
    activations: dict[str, list[tuple[Tensor, int]]]
    left_out: dict[str, str]
