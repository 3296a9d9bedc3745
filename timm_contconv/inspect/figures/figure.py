"""Figure: a Vega-Lite specification that draws itself; colours, fonts and axes that figures have in common."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vl_convert
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..writing import write_whole

__all__ = [
    "AFTER",
    "ALERT",
    "BEFORE",
    "BY_LAYER",
    "DIVERGING",
    "FEW_TICKS",
    "INK",
    "OVERLAP",
    "PERCENTS",
    "Figure",
    "bare",
    "by_layer",
    "colour",
    "data",
    "number",
    "percentile_bars",
    "percentiles",
    "rounded",
    "square_rows",
    "squares",
    "text",
]

#: colours: the model now, what it started from, limits, text and outlines
AFTER, BEFORE, ALERT, INK = "#1f5fa8", "#8a8f98", "#b3411e", "#222222"
#: size of a square relative to the step to the next one, so that no seams are seen
OVERLAP = 1.1
#: an axis whose labels do not meet, also on small screens
FEW_TICKS = {"tickCount": 6}
#: pixels of a chart, and of a row in it
WIDTH, STEP = 560, 18
#: the vertical channel of `by_layer`
BY_LAYER = {"field": "layer", "type": "nominal", "sort": None, "title": None}
#: percentiles of a distribution; those of more values than MOST_VALUES are of an even choice
PERCENTS, MOST_VALUES = (5, 25, 50, 75, 95), 100_000

#: 0 is white
SEQUENTIAL = ("#ffffff", "#a9cbe6", AFTER, "#08264d")
#: negative values are blue, positive ones red, 0 is white
DIVERGING = ("#0b3c75", "#3b7fbd", "#9cc6e0", "#ffffff", "#f2b098", "#d0583f", "#8a1522")

_CONFIG: dict[str, Any] = {
    "font": "system-ui, 'Liberation Sans', sans-serif",
    "background": "white",
    "view": {"stroke": None},
    "axis": {
        "gridColor": "#e6e6e6",
        "labelColor": INK,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "labelLimit": 170,
    },
    "legend": {"labelColor": INK, "titleColor": INK, "orient": "top"},
    "title": {"anchor": "start", "color": INK, "fontSize": 12, "fontWeight": "normal"},
    "header": {"labelColor": INK, "title": None, "labelLimit": 100},
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture as a Vega-Lite specification. Notebooks show it.

    Attributes:
        body: the specification without the style of this package.
    """

    body: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The Vega-Lite specification, as `altair.Chart.from_dict` and vega-embed take it."""
        return {**self.body, "config": _CONFIG}

    def to_png(self, scale: float = 2.0) -> bytes:
        """A PNG file of at most 256 colours, with `scale` pixels for each pixel of the figure."""
        file = io.BytesIO()
        self._image(scale).quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()

    def to_array(self, scale: float = 1.0) -> NDArray[np.uint8]:
        """(H, W, 3), as TensorBoard's `add_image` takes it with dataformats="HWC"."""
        return np.asarray(self._image(scale))

    def _image(self, scale: float) -> Image.Image:
        return Image.open(io.BytesIO(vl_convert.vegalite_to_png(self.to_dict(), scale=scale))).convert("RGB")

    def save(self, path: str | Path, scale: float = 2.0) -> Path:
        """Write the figure as .png or .svg, by the name of the file.

        Raises:
            ValueError: another suffix.
            OSError: the file can't be written; nothing is left of it.
        """
        path = Path(path)
        if path.suffix == ".png":
            return write_whole(path, self.to_png(scale))
        if path.suffix == ".svg":
            return write_whole(path, vl_convert.vegalite_to_svg(self.to_dict()).encode())
        raise ValueError(f"path={str(path)!r}: expected a name that ends in .png or .svg")

    def _repr_png_(self) -> bytes:
        return self.to_png()


def by_layer(rows: Sequence[dict[str, Any]], **body: Any) -> Figure:
    """A chart of rows with a `layer` each, which stand below one another."""
    layers = len({row["layer"] for row in rows})
    return Figure({"data": data(rows), "width": WIDTH, "height": STEP * layers, **body})


def data(rows: str | Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a figure, or the name of rows that a page fills in."""
    return {"name": rows} if isinstance(rows, str) else {"values": list(rows)}


# ---- channels


def text(field: str, **more: Any) -> dict[str, Any]:
    """A nominal channel."""
    return {"field": field, "type": "nominal", **more}


def number(field: str, **more: Any) -> dict[str, Any]:
    """A quantitative channel."""
    return {"field": field, "type": "quantitative", **more}


def bare(field: str, **scale: Any) -> dict[str, Any]:
    """A quantitative channel without an axis, from the smallest to the largest value."""
    return number(field, axis=None, scale={"nice": False, "zero": False, "padding": 0, **scale})


def colour(field: str, colours: Sequence[str] = SEQUENTIAL, low: float = 0.0) -> dict[str, Any]:
    """A value from `low` to 1 as a colour, without a legend."""
    steps = len(colours) - 1
    domain = [round(low + (1 - low) * step / steps, 3) for step in range(steps + 1)]
    return number(field, scale={"range": list(colours), "domain": domain, "interpolate": "rgb"}, legend=None)


# ---- squares


def squares(x: dict[str, Any], y: dict[str, Any], **channels: Any) -> dict[str, Any]:
    """Marks from (x, y) to (x2, y2)."""
    place = {"x": x, "y": y, "x2": {"field": "x2"}, "y2": {"field": "y2"}}
    return {"mark": {"type": "rect", "strokeWidth": 0}, "encoding": {**place, **channels}}


def square_rows(
    values: Tensor, step: float, left: float = 0, top: float = 0, right: float = math.inf, bottom: float = math.inf
) -> list[dict[str, float]]:
    """Values (H, W) as squares for `squares`, from (left, top) on, that end at (right, bottom)."""
    return [
        {
            "x": (x := left + c * step),
            "y": (y := top + r * step),
            "x2": min(x + OVERLAP * step, right),
            "y2": min(y + OVERLAP * step, bottom),
            "v": round(value, 3),
        }
        for r, line in enumerate(values.tolist())
        for c, value in enumerate(line)
    ]


# ---- distributions


def rounded(value: float) -> float:
    """Three digits, so that files are small."""
    return float(f"{value:.3g}")


def percentiles(values: Tensor, percents: Sequence[int] = PERCENTS) -> dict[str, float]:
    """{"q5": 5th percentile, ...} of values (N,); of more than MOST_VALUES, those of an even choice."""
    values = values[:: max(1, len(values) // MOST_VALUES)]
    found = torch.quantile(values, torch.tensor([percent / 100 for percent in percents])).tolist()
    return {f"q{percent}": rounded(value) for percent, value in zip(percents, found, strict=True)}


def percentile_bars(x: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers that draw q5 to q95 as a line, q25 to q75 as a bar and q50 as a mark, on the horizontal channel `x`."""

    def layer(start: str, end: str | None = None, **mark: Any) -> dict[str, Any]:
        return {"mark": mark, "encoding": {"x": {**x, "field": start}, **({"x2": {"field": end}} if end else {})}}

    return [
        layer("q5", "q95", type="rule", color=AFTER, strokeWidth=1.5),
        layer("q25", "q75", type="bar", color=AFTER, opacity=0.55, height=9),
        layer("q50", type="tick", color=INK, thickness=2, height=13),
    ]
