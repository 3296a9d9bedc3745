"""Frequencies of kernels: one kernel's spectrum, and the distribution in every layer (Romero et al. 2022, Fig. 8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shown import Layers, ShownLayer, as_layers
from .figure import (
    ALERT,
    BY_LAYER,
    FEW_TICKS,
    INK,
    Figure,
    bare,
    by_layer,
    colour,
    data,
    number,
    percentile_bars,
    percentiles,
    rounded,
    squares,
    text,
)

__all__ = ["NYQUIST", "frequencies", "spectrum_panel", "spread_of_power"]

#: the highest frequency that pixels can represent, in cycles per pixel
NYQUIST = 0.5
#: a kernel's spread is the frequency below which this part of its power lies
POWER = 0.95
POINTS = 64  # of a Fourier transform


def frequencies(model: Layers) -> Figure:
    """The frequency below which 95 % of a kernel's power lies, for the kernels of each layer; with f+ and Nyquist.

    Args:
        model: a model that holds layers of this package, or what `shown_layers` made of one.

    Raises:
        ValueError: the model holds no such layer.
    """
    found = as_layers(model)
    rows = [_row(layer) for layer in found]
    top = max(NYQUIST, *(row[key] or 0 for row in rows for key in ("q75", "highest")))
    scale = {"type": "linear" if top < 1 else "sqrt", "domain": [0, 1.05 * top], "nice": False}
    x = {"type": "quantitative", "scale": scale, "title": "cycles per pixel", "axis": FEW_TICKS}
    tooltip = [text("layer"), number("q50", title="median"), number("highest", title="f⁺")]
    limits = {
        "transform": [{"filter": "isValid(datum.highest)"}],
        "mark": {"type": "point", "shape": "diamond", "filled": True, "color": ALERT, "size": 60, "opacity": 1},
        "encoding": {"x": {**x, "field": "highest"}},
    }
    nyquist = {
        "data": data([{"nyquist": NYQUIST}]),
        "mark": {"type": "rule", "color": INK, "strokeDash": [5, 3]},
        "encoding": {"x": {**x, "field": "nyquist"}},
    }
    _, *bars = percentile_bars(x)  # no whiskers
    layers = {"encoding": {"y": BY_LAYER, "tooltip": tooltip}, "layer": [*bars, limits]}
    return by_layer(rows, layer=[layers, nyquist])


def _row(layer: ShownLayer) -> dict[str, Any]:
    spread = spread_of_power(layer.kernels.values, layer.kernels.spacing)
    highest = None if layer.highest_frequency is None else rounded(layer.highest_frequency)
    return {"layer": layer.label, **percentiles(spread, (25, 50, 75)), "highest": highest}


def spread_of_power(kernels: Tensor, spacing: float = 1.0) -> Tensor:
    """The frequency below which 95 % of a kernel's power lies, in cycles per pixel, along both axes.

    Args:
        kernels: (C, H, W).
        spacing: pixels from sample to sample.

    Returns:
        (C,).
    """
    points = max(POINTS, *kernels.shape[1:])
    power = torch.fft.fft2(kernels, s=(points, points)).abs().square().flatten(1)
    axis = torch.fft.fftfreq(points, spacing)
    radius, order = torch.maximum(axis.abs()[:, None], axis.abs()).flatten().sort()
    held = power[:, order].double().cumsum(1)
    first = (held < POWER * held[:, -1:]).sum(1).clamp(max=len(radius) - 1)
    return radius[first]


def spectrum_panel(
    pixels: str | list[dict[str, Any]],
    circle: str | list[dict[str, Any]],
    nyquist: str | list[dict[str, Any]],
    size: int = 220,
) -> dict[str, Any]:
    """The magnitude of one kernel's Fourier transform, a square at Nyquist, and a circle at f+.

    Args:
        pixels: rows with x, y, x2, y2 in cycles per pixel and v from 0 to 1; or the name of data that a page fills in.
        circle, nyquist: rows with x, y and an order o; or a name.
        size: of the picture, in pixels.
    """
    axis = {"tickCount": 5, "grid": False, "offset": 4}
    x, y = ({**bare(field), "axis": axis, "title": title} for field, title in (("x", "cycles per pixel"), ("y", None)))
    outline = {"x": x, "y": y, "order": number("o")}
    dashed = {"type": "line", "color": INK, "strokeDash": [5, 3], "clip": True}
    layers = [
        {"data": data(pixels), **squares(x, y, color=colour("v"))},
        {"data": data(nyquist), "mark": dashed, "encoding": outline},
        {"data": data(circle), "mark": {"type": "line", "color": ALERT, "clip": True}, "encoding": outline},
    ]
    return {"layer": layers, "width": size, "height": size}
