"""What each layer takes of the model's time, beside its part of the multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .figure import AFTER, BEFORE, BY_LAYER, FEW_TICKS, Figure, by_layer, number, rounded, text

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
        {"layer": layer.label, "of": name, "part": rounded(100 * getattr(layer, key))}
        for layer in layers
        for key, name in names.items()
        if getattr(layer, key) is not None
    ]
    order = [name for name in names.values() if any(row["of"] == name for row in rows)]
    legend = {"domain": order, "range": [AFTER, BEFORE][: len(order)]}
    encoding = {
        "x": number("part", title="percent of the model", axis=FEW_TICKS),
        "y": BY_LAYER,
        "yOffset": text("of", sort=order),
        "color": text("of", title=None, scale=legend),
        "tooltip": [text("layer"), text("of", title="part of the"), number("part", title="percent")],
    }
    return by_layer(rows, mark="bar", encoding=encoding)
