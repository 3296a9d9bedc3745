"""Kernels, with the elements that they are made of drawn over them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layers.core.shown import Elements
from ..shown import Layers, ShownLayer, as_layers
from .figure import DIVERGING, INK, Figure, bare, colour, data, number, square_rows, squares, text

__all__ = ["Window", "kernel_panel", "kernels", "spread", "window_of"]

#: what is smaller than this part of the largest value counts as nothing where kernels are cropped
NOTHING = 1e-2
PANEL = 105  # pixels of a kernel in `kernels`
LARGEST_DOT = 0.0012  # area of a dot relative to that of the picture
MOST_OUTLINES, FAINTEST = 16, 0.2  # of a kernel's elements; opacity of an outline
CORNERS = {"ellipse": 24, "diamond": 4, "box": 4, "point": 0}


class Window(NamedTuple):
    """A square part of kernels, in samples: rows and columns from the first one, and its size."""

    row: int
    column: int
    size: int

    def cut(self, kernels: Tensor) -> Tensor:
        """(C, size, size): this part of kernels (C, H, W); zeros where it is larger than they are."""
        rows, columns = kernels.shape[1:]
        before = (max(-self.column, 0), max(-self.row, 0))
        after = (max(self.column + self.size - columns, 0), max(self.row + self.size - rows, 0))
        padded = torch.nn.functional.pad(kernels, (before[0], after[0], before[1], after[1]))
        row, column = self.row + before[1], self.column + before[0]
        return padded[:, row : row + self.size, column : column + self.size]


def window_of(kernels: Tensor) -> Window:
    """The smallest square, with a margin of a sample, that holds what is not nothing in any of kernels (C, H, W)."""
    size = kernels.abs().amax(0)
    rows, columns = ((size > NOTHING * size.max()).any(d).nonzero().flatten() for d in (1, 0))
    if not len(rows):
        rows = columns = torch.tensor([0])
    first = (max(int(rows[0]) - 1, 0), max(int(columns[0]) - 1, 0))
    last = (min(int(rows[-1]) + 1, size.shape[0] - 1), min(int(columns[-1]) + 1, size.shape[1] - 1))
    side = max(end - begin + 1 for begin, end in zip(first, last, strict=True))
    row, column = ((begin + end - side + 1) // 2 for begin, end in zip(first, last, strict=True))
    return Window(row, column, side)


def kernels(model: Layers, layers: int = 4, channels: int = 6) -> Figure:
    """Kernels of some layers and channels, cropped to where something is, with their elements drawn over them.

    Args:
        model: a model that holds layers of this package, or what `shown_layers` made of one.
        layers: rows of the picture, one per layer, evenly spread over the model.
        channels: columns of the picture: output channels, evenly spread.

    Raises:
        ValueError: the model holds no such layer.
    """
    found = as_layers(model)
    rows = [_row(found[index], channels) for index in spread(len(found), layers)]
    return Figure({"vconcat": rows, "spacing": 14})


def _row(layer: ShownLayer, channels: int) -> dict[str, Any]:
    values, spacing = layer.kernels.values, layer.kernels.spacing
    chosen = spread(len(values), channels)
    window = window_of(values)
    cut = window.cut(values[chosen])
    panels = []
    for channel, kernel in zip(chosen, cut, strict=True):
        elements = layer.kernels.elements
        dots = [] if elements is None else dot_rows(elements, channel, PANEL)
        outlines = [] if elements is None else outline_rows(elements, channel)
        panel = kernel_panel(pixel_rows(kernel, window, spacing), dots, outlines, PANEL)
        panels.append({**panel, "title": {"text": f"channel {channel}", "fontSize": 10}})
    size, side = "×".join(map(str, layer.kernel_size)), round(window.size * spacing)
    shown = "" if side >= max(layer.kernel_size) else f", shown: {side}×{side}"
    title = f"{layer.name}: {layer.summary}, kernels of {size} pixels{shown}"
    return {"hconcat": panels, "spacing": 8, "title": title}


def kernel_panel(
    pixels: str | list[dict[str, Any]],
    dots: str | list[dict[str, Any]],
    outlines: str | list[dict[str, Any]],
    size: int = 220,
) -> dict[str, Any]:
    """One kernel: its values as colours, outlines of its elements, and dots with areas by their weights.

    Args:
        pixels, dots, outlines: as `pixel_rows`, `dot_rows` and `outline_rows` give them; or names of data that a page
            fills in.
        size: of the picture, in pixels.
    """
    x, y = bare("x"), bare("y", reverse=True)
    line = {"type": "line", "color": INK, "strokeWidth": 0.8, "clip": True}
    opacity = number("a", scale=None)
    point = {"type": "point", "filled": True, "color": INK, "stroke": "white", "strokeWidth": 0.7, "clip": True}
    area = number("s", scale=None)
    layers = [
        {"data": data(pixels), **squares(x, y, color=colour("v", DIVERGING, low=-1))},
        {
            "data": data(outlines),
            "mark": line,
            "encoding": {"x": x, "y": y, "detail": text("e"), "order": number("o"), "opacity": opacity},
        },
        {"data": data(dots), "mark": point, "encoding": {"x": x, "y": y, "size": area, "opacity": {"value": 1}}},
    ]
    return {"layer": layers, "width": size, "height": size}


def pixel_rows(kernel: Tensor, window: Window, spacing: float = 1.0) -> list[dict[str, float]]:
    """A kernel (size, size) as squares from (x, y) to (x2, y2), with values relative to the largest."""
    left, top = window.column * spacing - 0.5, window.row * spacing - 0.5
    side = window.size * spacing
    return square_rows(kernel / (float(kernel.abs().max()) or 1.0), spacing, left, top, left + side, top + side)


def dot_rows(elements: Elements, channel: int, size: int) -> list[dict[str, float]]:
    """The elements of a channel as dots with an area by their weights, in a picture of `size` pixels."""
    areas = LARGEST_DOT * size**2 * (1 / 3 if elements.weight is None else 1) * _strengths(elements, channel)
    positions = _of_channel(elements.position, channel).tolist()
    return [{"x": round(x, 3), "y": round(y, 3), "s": s} for (y, x), s in zip(positions, areas.tolist(), strict=True)]


def outline_rows(elements: Elements, channel: int) -> list[dict[str, float]]:
    """The outlines of the elements with the largest weights, as closed lines; the smaller the weight, the fainter."""
    if elements.reach is None:
        return []
    strengths = _strengths(elements, channel)
    positions, reaches = (_of_channel(values, channel).tolist() for values in (elements.position, elements.reach))
    angles = torch.zeros(len(positions)) if elements.angle is None else _of_channel(elements.angle, channel)
    corners = CORNERS[elements.form]
    turn, stretch = (math.pi / 4, math.sqrt(2)) if elements.form == "box" else (0.0, 1.0)
    rows = []
    for index in strengths.argsort(descending=True)[:MOST_OUTLINES].tolist():
        (y, x), (ry, rx), angle = positions[index], reaches[index], float(angles[index])
        cosine, sine = math.cos(angle), math.sin(angle)
        faint = round(FAINTEST + (1 - FAINTEST) * float(strengths[index]), 3)
        for corner in range(corners + 1):
            around = turn + 2 * math.pi * corner / corners
            u, v = stretch * ry * math.sin(around), stretch * rx * math.cos(around)
            x_corner, y_corner = round(x + sine * u + cosine * v, 3), round(y + cosine * u - sine * v, 3)
            rows.append({"x": x_corner, "y": y_corner, "a": faint, "e": index, "o": corner})
    return rows


def _of_channel(values: Tensor, channel: int) -> Tensor:
    """Values (C, ...) of a channel, or (1, ...) of all."""
    return values[channel % len(values)]


def _strengths(elements: Elements, channel: int) -> Tensor:
    """(m,): the absolute weights of a channel's elements relative to the largest; 1 without weights."""
    if elements.weight is None:
        return torch.ones(elements.position.shape[1])
    weight = elements.weight[channel].abs()
    return weight / weight.max().clamp_min(1e-30)


def spread(length: int, count: int) -> list[int]:
    """`count` indices, at most `length`, evenly spread."""
    count = min(count, length)
    indices: list[int] = torch.linspace(0, length - 1, count).round().int().tolist()
    return indices
