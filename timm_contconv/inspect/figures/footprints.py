"""The footprint of every layer: the normalised sum of its absolute kernels (Kim and Park 2023, Fig. 5)."""

from __future__ import annotations

from ..shown import Layers, ShownLayer, as_layers
from .figure import OVERLAP, Figure, bare, colour, data, squares, text

__all__ = ["footprints"]

FAINT = 0.01
SIZE = 92


def footprints(model: Layers, columns: int = 6) -> Figure:
    """Where the kernels of each layer are large: the mean of their absolute values, from 0 to 1, all to one scale.

    Args:
        model: a model that holds layers of this package, or what `shown_layers` made of one.
        columns: panels side by side.

    Raises:
        ValueError: the model holds no such layer.
    """
    found = as_layers(model)
    rows = [row for layer in found for row in _rows(layer)]
    panel = {**squares(bare("x"), bare("y", reverse=True), color=colour("v")), "width": SIZE, "height": SIZE}
    facet = text("layer", sort=[layer.label for layer in found], title=None)
    return Figure({"data": data(rows), "facet": facet, "columns": columns, "spacing": 10, "spec": panel})


def _rows(layer: ShownLayer) -> list[dict[str, object]]:
    """Squares, in pixels from the kernel's centre; what is nearly 0 is left out."""
    spacing = layer.kernels.spacing
    mean = layer.kernels.values.abs().mean(0)
    mean = mean / mean.max().clamp_min(1e-30)
    height, width = (size * spacing / 2 for size in mean.shape)
    return [
        {
            "layer": layer.label,
            "x": round(c * spacing - width, 3),
            "x2": round((c + OVERLAP) * spacing - width, 3),
            "y": round(r * spacing - height, 3),
            "y2": round((r + OVERLAP) * spacing - height, 3),
            "v": round(value, 2),
        }
        for r, line in enumerate(mean.tolist())
        for c, value in enumerate(line)
        if value >= FAINT
    ]
