"""Frequencies of kernels: one kernel's spectrum, and the distribution in every layer (Romero et al. 2022, Fig. 8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shown import Layers, ShownLayer, as_layers
from .figure import ALERT, FEW_TICKS, INK, STEP, WIDTH, Figure, colour, data, percentile_bars

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
    y = {"field": "layer", "type": "nominal", "sort": None, "title": None}
    tooltip = [
        {"field": "layer", "type": "nominal"},
        {"field": "q50", "type": "quantitative", "title": "median"},
        {"field": "highest", "type": "quantitative", "title": "f⁺"},
    ]
    limits = {
        "transform": [{"filter": "isValid(datum.highest)"}],
        "mark": {"type": "point", "shape": "diamond", "filled": True, "color": ALERT, "size": 60, "opacity": 1},
        "encoding": {"x": {**x, "field": "highest"}, "y": y, "tooltip": tooltip},
    }
    nyquist = {
        "data": data([{"nyquist": NYQUIST}]),
        "mark": {"type": "rule", "color": INK, "strokeDash": [5, 3]},
        "encoding": {"x": {**x, "field": "nyquist"}},
    }
    bars = [
        {**bar, "encoding": {**bar["encoding"], "y": y, "tooltip": tooltip}}
        for bar in percentile_bars(x, whiskers=False)
    ]
    return Figure({"data": data(rows), "layer": [*bars, limits, nyquist], "width": WIDTH, "height": STEP * len(rows)})


def _row(layer: ShownLayer) -> dict[str, Any]:
    spread = spread_of_power(layer.kernels.values, layer.kernels.spacing)
    quartiles = torch.quantile(spread, torch.tensor([0.25, 0.5, 0.75])).tolist()
    highest = layer.highest_frequency
    return {
        "layer": layer.label,
        **{f"q{q}": float(f"{v:.3g}") for q, v in zip((25, 50, 75), quartiles, strict=True)},
        "highest": None if highest is None else float(f"{highest:.3g}"),
    }


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
    channel = {"type": "quantitative", "axis": axis, "scale": {"nice": False, "zero": False, "padding": 0}}
    x, y = {**channel, "field": "x", "title": "cycles per pixel"}, {**channel, "field": "y", "title": None}
    box = {"x": x, "y": y, "x2": {"field": "x2"}, "y2": {"field": "y2"}, "color": colour("v")}
    outline = {"x": x, "y": y, "order": {"field": "o", "type": "quantitative"}}
    dashed = {"type": "line", "color": INK, "strokeDash": [5, 3], "clip": True}
    layers = [
        {"data": data(pixels), "mark": {"type": "rect", "strokeWidth": 0}, "encoding": box},
        {"data": data(nyquist), "mark": dashed, "encoding": outline},
        {"data": data(circle), "mark": {"type": "line", "color": ALERT, "clip": True}, "encoding": outline},
    ]
    return {"layer": layers, "width": size, "height": size}
