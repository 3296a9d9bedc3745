"""The effective receptive field as a picture, with the squares that hold parts of it."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from ..receptive_field import SHARES, ReceptiveField
from .figure import ALERT, Figure, colour, data, number, square_rows, squares

__all__ = ["receptive_field"]

MOST_CELLS = 64
SIZE = 280


def receptive_field(field: ReceptiveField, title: str = "") -> Figure:
    """How much each pixel contributes to the centre of the last feature map, and squares with 20, 50, 99 % of it.

    The colour is the fourth root of the contribution relative to the largest, so that small ones are seen.

    Args:
        field: as `effective_receptive_field` measures it.
        title: of the picture.
    """
    height, width = field.contributions.shape
    step = max(1, -(-max(height, width) // MOST_CELLS))
    cells = F.avg_pool2d(field.contributions[None, None], step, ceil_mode=True)[0, 0].float()
    cells = (cells / cells.max()).pow(0.25)
    rows = square_rows(cells, step, right=width, bottom=height)
    x, y = _axis("x", width, title="pixels of the image"), _axis("y", height, reverse=True)
    outline = {"type": "rect", "filled": False, "stroke": ALERT, "strokeWidth": 1.5}
    layers = [
        {"data": data(rows), **squares(x, y, color=colour("v"))},
        {"data": data(_square(field, share) for share in SHARES), **squares(x, y), "mark": outline},
    ]
    shape = {"width": SIZE, "height": round(SIZE * height / width), "usermeta": {"isPicture": True}}
    return Figure({"title": title, "layer": layers, **shape})


def _axis(field: str, size: int, title: str | None = None, **scale: Any) -> dict[str, Any]:
    return number(field, title=title, axis={"grid": False}, scale={"domain": [0, size], "nice": False, **scale})


def _square(field: ReceptiveField, share: float) -> dict[str, Any]:
    height, width = field.contributions.shape
    half = field.square(share) // 2
    row, column = height // 2, width // 2
    return {
        "x": max(column - half, 0),
        "x2": min(column + half + 1, width),
        "y": max(row - half, 0),
        "y2": min(row + half + 1, height),
    }
