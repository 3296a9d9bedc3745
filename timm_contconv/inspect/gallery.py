"""The data of the page's gallery: kernels of every layer and channel, with their elements, as compact arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers.core.plain import centred
from ..layers.core.shown import Elements
from .figures.kernels import Window, spread, window_of
from .packing import Packer
from .shown import ShownLayer

__all__ = ["gallery"]

#: bytes of kernels and weights before compression; models with more show an even choice of their channels
MOST_BYTES = 4_500_000
FEWEST_CHANNELS = 8


def gallery(layers: Sequence[ShownLayer], most_bytes: int = MOST_BYTES) -> tuple[list[dict[str, Any]], str]:
    """What the page's script draws kernels from.

    Returns:
        For each layer, its texts, and the places of its arrays in the second value, as `Packer` makes them.
    """
    part = min(1.0, most_bytes / max(1, sum(map(_bytes, layers))))
    packer = Packer()
    entries = [_entry(layer, part, packer) for layer in layers]
    return entries, packer.packed()


def _bytes(layer: ShownLayer) -> int:
    """About the size of one layer's arrays."""
    kernels, elements = layer.kernels.values, layer.kernels.elements
    size = window_of(kernels).size ** 2 + (0 if layer.start is None else layer.start.kernels[0].numel())
    if elements is not None and elements.weight is not None:
        size += elements.weight.shape[1]
    return len(kernels) * size


def _entry(layer: ShownLayer, part: float, packer: Packer) -> dict[str, Any]:
    total = len(layer.kernels.values)
    chosen = spread(total, max(FEWEST_CHANNELS, int(part * total)))
    elements, spacing = layer.kernels.elements, layer.kernels.spacing
    now, start = layer.kernels.values[chosen], _start(layer)
    window = window_of(now)
    start_window = window
    if start is not None and spacing == 1:  # one frame for both
        window = start_window = window_of(torch.cat((now, start[chosen])))
    elif start is not None:
        start_window = window_of(start[chosen])
    return {
        "name": layer.name,
        "summary": layer.summary,
        "kernelSize": "×".join(map(str, layer.kernel_size)),
        "channels": chosen,
        "total": total,
        "highest": layer.highest_frequency,
        "now": _kernels(now, window, spacing, packer),
        "start": None if start is None else _kernels(start[chosen], start_window, 1.0, packer),
        "elements": None if elements is None else _elements(elements, chosen, packer),
    }


def _start(layer: ShownLayer) -> Tensor | None:
    """The kernels that a layer started from; in the size of its present ones, unless these are finely sampled."""
    if layer.start is None or layer.kernels.spacing < 1:
        return None if layer.start is None else layer.start.kernels
    return centred(layer.start.kernels, layer.kernels.values.shape[1:])


def _kernels(kernels: Tensor, window: Window, spacing: float, packer: Packer) -> dict[str, Any]:
    values = packer.add(window.cut(kernels), bits=8, rowwise=True)
    return {"window": window._asdict(), "spacing": spacing, "values": values}


def _elements(elements: Elements, chosen: Sequence[int], packer: Packer) -> dict[str, Any]:
    def of_chosen(values: Tensor) -> Tensor:
        return values if len(values) == 1 else values[torch.tensor(chosen)]

    reach, angle, weight = elements.reach, elements.angle, elements.weight
    return {
        "form": elements.form,
        "label": elements.label,
        "position": packer.add(of_chosen(elements.position), bits=16),
        "reach": None if reach is None else packer.add(of_chosen(reach), bits=16),
        "angle": None if angle is None else packer.add(of_chosen(angle), bits=16),
        "weight": None if weight is None else packer.add(of_chosen(weight), bits=8, rowwise=True),
    }
