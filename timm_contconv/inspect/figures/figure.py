"""Figure: a Vega-Lite specification that draws itself; colours, fonts and axes that figures have in common."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
from numpy.typing import NDArray
from PIL import Image

from ..writing import write_whole

__all__ = [
    "AFTER",
    "ALERT",
    "BEFORE",
    "DIVERGING",
    "FEW_TICKS",
    "INK",
    "OVERLAP",
    "STEP",
    "WIDTH",
    "Figure",
    "bare",
    "colour",
    "data",
    "percentile_bars",
]

#: colours: the model now, what it started from, limits, text and outlines
AFTER, BEFORE, ALERT, INK = "#1f5fa8", "#8a8f98", "#b3411e", "#222222"
#: size of a square relative to the step to the next one, so that no seams are seen
OVERLAP = 1.1
#: an axis whose labels do not meet, also on small screens
FEW_TICKS = {"tickCount": 6}
#: pixels of a chart, and of a row in it
WIDTH, STEP = 560, 18

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


def data(rows: str | Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a figure, or the name of rows that a page fills in."""
    return {"name": rows} if isinstance(rows, str) else {"values": list(rows)}


def bare(field: str, **scale: Any) -> dict[str, Any]:
    """A quantitative channel without an axis, from the smallest to the largest value."""
    scale = {"nice": False, "zero": False, "padding": 0, **scale}
    return {"field": field, "type": "quantitative", "axis": None, "scale": scale}


def colour(field: str, colours: Sequence[str] = SEQUENTIAL, low: float = 0.0) -> dict[str, Any]:
    """A value from `low` to 1 as a colour, without a legend."""
    steps = len(colours) - 1
    domain = [round(low + (1 - low) * step / steps, 3) for step in range(steps + 1)]
    scale = {"range": list(colours), "domain": domain, "interpolate": "rgb"}
    return {"field": field, "type": "quantitative", "scale": scale, "legend": None}


def percentile_bars(x: dict[str, Any], whiskers: bool = True) -> list[dict[str, Any]]:
    """Layers that draw q5 to q95 as a line, q25 to q75 as a bar and q50 as a mark, on the horizontal channel `x`."""
    line = {"mark": {"type": "rule", "color": AFTER, "strokeWidth": 1.5}, "encoding": _from_to(x, "q5", "q95")}
    bar = {"mark": {"type": "bar", "color": AFTER, "opacity": 0.55, "height": 9}, "encoding": _from_to(x, "q25", "q75")}
    mark = {
        "mark": {"type": "tick", "color": INK, "thickness": 2, "height": 13},
        "encoding": {"x": {**x, "field": "q50"}},
    }
    return [*([line] if whiskers else []), bar, mark]


def _from_to(x: dict[str, Any], start: str, end: str) -> dict[str, Any]:
    return {"x": {**x, "field": start}, "x2": {"field": end}}
