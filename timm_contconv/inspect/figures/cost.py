"""What each layer takes of the model's time, beside its part of the multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .figure import AFTER, BEFORE, FEW_TICKS, STEP, WIDTH, Figure, data

__all__ = ["LayerCost", "cost"]


class LayerCost(NamedTuple):
    """One layer's parts of its model, 0 to 1.

    Attributes:
        label: name of the layer on the axis.
        time: part of the measured time.
        multiply_adds: part of the multiply-adds; None if they are not known.
    """

    label: str
    time: float
    multiply_adds: float | None


def cost(layers: Sequence[LayerCost]) -> Figure:
    """Bars of each layer's part of the time and of the multiply-adds, in percent.

    Args:
        layers: in the order of the model.
    """
    names = {"time": "measured time", "multiply_adds": "multiply-adds"}
    rows = [
        {"layer": layer.label, "of": text, "part": float(f"{100 * getattr(layer, key):.3g}")}
        for layer in layers
        for key, text in names.items()
        if getattr(layer, key) is not None
    ]
    order = [text for text in names.values() if any(row["of"] == text for row in rows)]
    legend = {"domain": order, "range": [AFTER, BEFORE][: len(order)]}
    encoding = {
        "x": {"field": "part", "type": "quantitative", "title": "percent of the model", "axis": FEW_TICKS},
        "y": {"field": "layer", "type": "nominal", "sort": None, "title": None},
        "yOffset": {"field": "of", "type": "nominal", "sort": order},
        "color": {"field": "of", "type": "nominal", "title": None, "scale": legend},
        "tooltip": [
            {"field": "layer", "type": "nominal"},
            {"field": "of", "type": "nominal", "title": "part of the"},
            {"field": "part", "type": "quantitative", "title": "percent"},
        ],
    }
    return Figure(
        {"data": data(rows), "mark": "bar", "encoding": encoding, "width": WIDTH, "height": STEP * len(layers)}
    )
