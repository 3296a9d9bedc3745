"""Distributions of a layer's geometry by depth, and how far it moved since the patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shown import Layers, as_layers
from .figure import FEW_TICKS, STEP, WIDTH, Figure, data, percentile_bars

__all__ = ["geometry", "movements", "quantity_names"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_VALUES = 100_000  # quantiles of more are those of an even choice


def quantity_names(model: Layers) -> list[str]:
    """The quantities that the layers of a model show, in their order."""
    return list(dict.fromkeys(quantity.name for layer in as_layers(model) for quantity in layer.quantities))


def geometry(model: Layers, name: str) -> Figure:
    """The distribution of one quantity in every layer, from the first layer to the last.

    Args:
        model: a model that holds layers of this package, or what `shown_layers` made of one.
        name: one of `quantity_names(model)`.

    Raises:
        ValueError: the model holds no layer of this package, or no layer shows this quantity.
    """
    rows, unit = [], ""
    for layer in as_layers(model):
        for quantity in layer.quantities:
            if quantity.name == name:
                length = torch.linalg.vector_norm(quantity.values, dim=1)
                values = quantity.values[:, 0] if quantity.values.shape[1] == 1 else length
                rows.append({"layer": layer.label, **_quantiles(values)})
                unit = quantity.unit
    if not rows:
        raise ValueError(f"name={name!r}: expected one of {quantity_names(model)}")
    return _bars(rows, f"{name}, {unit}" if unit else name)


def movements(model: Layers, name: str) -> Figure:
    """How far the values of one quantity are from where they started, in every layer.

    Args:
        model, name: as for `geometry`.

    Raises:
        ValueError: as `geometry`; or the start of no layer is known.
    """
    rows, unit = [], ""
    for layer in as_layers(model):
        for quantity in layer.quantities:
            moved = layer.moved(quantity) if quantity.name == name else None
            if moved is not None:
                rows.append({"layer": layer.label, **_quantiles(moved)})
                unit = quantity.unit
    if not rows:
        raise ValueError(f"name={name!r}: it is not known where it started; give the model at its start")
    return _bars(rows, f"change of {name}" + f", {unit}" * bool(unit))


def _quantiles(values: Tensor) -> dict[str, float]:
    values = values[:: max(1, len(values) // MOST_VALUES)]
    found = torch.quantile(values, torch.tensor(QUANTILES)).tolist()
    return {f"q{round(100 * q)}": _short(v) for q, v in zip(QUANTILES, found, strict=True)}


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _bars(rows: list[dict[str, Any]], title: str) -> Figure:
    """A bar from the 25th to the 75th percentile, a line from the 5th to the 95th, a mark at the median."""
    tooltip = [{"field": "layer", "type": "nominal"}]
    for q in QUANTILES:
        percent = round(100 * q)
        tooltip.append({"field": f"q{percent}", "type": "quantitative", "title": f"{percent}th percentile"})
    return Figure(
        {
            "data": data(rows),
            "encoding": {"y": {"field": "layer", "type": "nominal", "sort": None, "title": None}, "tooltip": tooltip},
            "layer": percentile_bars({"type": "quantitative", "title": title, "axis": FEW_TICKS}),
            "width": WIDTH,
            "height": STEP * len(rows),
        }
    )
