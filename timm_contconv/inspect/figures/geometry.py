"""Distributions of a layer's geometry by depth, and how far it moved since the patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...layers.core.shown import Quantity
from ..shown import Layers, ShownLayer, as_layers
from .figure import BY_LAYER, FEW_TICKS, PERCENTS, Figure, by_layer, number, percentile_bars, percentiles, text

__all__ = ["geometry", "movements", "quantity_names"]


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
    layers = as_layers(model)
    return _bars(layers, name, name, _numbers, f"expected one of {quantity_names(layers)}")


def movements(model: Layers, name: str) -> Figure:
    """How far the values of one quantity are from where they started, in every layer.

    Args:
        model, name: as for `geometry`.

    Raises:
        ValueError: as `geometry`; or the start of no layer is known.
    """
    missing = "it is not known where it started; give the model at its start"
    return _bars(as_layers(model), name, f"change of {name}", ShownLayer.moved, missing)


def _numbers(layer: ShownLayer, quantity: Quantity) -> Tensor:
    """(N,): numbers as they are, vectors by their lengths."""
    values = quantity.values
    return values[:, 0] if values.shape[1] == 1 else torch.linalg.vector_norm(values, dim=1)


def _bars(
    layers: Sequence[ShownLayer],
    name: str,
    title: str,
    values_of: Callable[[ShownLayer, Quantity], Tensor | None],
    missing: str,
) -> Figure:
    """A bar from the 25th to the 75th percentile, a line from the 5th to the 95th, a mark at the median."""
    found = [(layer, q, values_of(layer, q)) for layer in layers for q in layer.quantities if q.name == name]
    rows = [{"layer": layer.label, **percentiles(values)} for layer, _, values in found if values is not None]
    if not rows:
        raise ValueError(f"name={name!r}: {missing}")
    unit = found[-1][1].unit
    x = {"type": "quantitative", "title": f"{title}, {unit}" if unit else title, "axis": FEW_TICKS}
    tooltip = [text("layer"), *(number(f"q{q}", title=f"{q}th percentile") for q in PERCENTS)]
    return by_layer(rows, encoding={"y": BY_LAYER, "tooltip": tooltip}, layer=percentile_bars(x))
