"""The report as one HTML file, from the template, the style and the script in `assets/`, with Vega inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from . import figures
from .figures.frequencies import spectrum_panel
from .figures.kernels import kernel_panel
from .findings import Findings, LayerRow
from .gallery import gallery
from .receptive_field import SHARES

__all__ = ["page"]

ASSETS = Path(__file__).parent / "assets"


#: a figure, and what it shows, for the caption and for screen readers
Drawing = tuple[figures.Figure, str]
WHEN = {"start": "before", "now": "now"}


def page(findings: Findings) -> str:
    """The whole page."""
    entries, arrays = gallery(findings.layers)
    drawings = _drawings(findings)
    panels = {
        "kernel": figures.Figure(kernel_panel("pixels", "dots", "outlines", 250)).to_dict(),
        "spectrum": figures.Figure(spectrum_panel("pixels", "circle", "nyquist", 250)).to_dict(),
    }
    rows = [_cells(row) for row in findings.rows]
    return _template().render(
        findings=findings,
        drawings=drawings,
        change=_change,
        duration=duration,
        columns=[title for title in rows[0] if any(row[title][0] for row in rows)],
        rows=rows,
        shares=SHARES,
        when=WHEN,
        style=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),
        script=Markup((ASSETS / "report.js").read_text(encoding="utf-8")),
        vega=Markup(_vega().replace("</script", "<\\/script")),
        specs=_json([figure.to_dict() for section in drawings.values() for figure, _ in section]),
        panels=_json(panels),
        entries=_json(entries),
        arrays=Markup(arrays),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2")


@cache
def _vega() -> str:
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _json(value: Any) -> Markup:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


# ---- numbers as text


def count(number: float | None) -> str:
    """A number of things with three digits: 1234 as "1.23 k"."""
    if number is None:
        return ""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{_three_digits(number / limit)}{unit}"
    return f"{number:g}"


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds with three digits, in seconds or milliseconds."""
    if seconds is None:
        return ""
    return f"{_three_digits(seconds)} s" if seconds >= 1 else f"{_three_digits(1e3 * seconds)} ms"


def _change(before: int | None, after: int | None) -> str:
    return count(after) if before is None or before == after else f"{count(before)} → {count(after)}"


def _cells(row: LayerRow) -> dict[str, tuple[str, Any]]:
    """A row of the table: for each column, a text, and what the column is sorted by."""
    field = row.receptive_field
    return {
        "layer": (row.name, row.name),
        "before": (row.before, row.before),
        "now": (row.after, row.after),
        "parameters": (_change(row.parameters_before, row.parameters_after), row.parameters_after),
        "multiply-adds": (_change(row.multiply_adds_before, row.multiply_adds_after), row.multiply_adds_after),
        "receptive field": ("", None) if field is None else ("×".join(map(str, field)), max(field)),
        "fit error": ("" if row.fit_error is None else f"{row.fit_error:.2g}", row.fit_error),
        "time": (duration(row.seconds), row.seconds),
        "share of time": ("" if row.share is None else f"{row.share:.1%}", row.share),
        "algorithm": (row.algorithm, row.algorithm),
    }


# ---- figures


def _drawings(findings: Findings) -> dict[str, list[Drawing]]:
    """The figures of each section of the page."""
    layers = findings.layers
    return {
        "cost": _cost(findings),
        "geometry": list(_geometry(findings)),
        "footprints": [(figures.footprints(layers), "Mean of the absolute kernels of each layer, one scale for all")],
        "frequencies": [(figures.frequencies(layers), "Frequency below which 95 % of a kernel's power lies, by layer")],
        "receptive-field": [
            (
                figures.receptive_field(field, WHEN[when]),
                f"Effective receptive field, {WHEN[when]}: 99 % of the contributions lie in a square of"
                f" {field.square(0.99)} pixels",
            )
            for when, field in findings.receptive_fields.items()
        ],
        "activation": list(_activations(findings)),
    }


def _cost(findings: Findings) -> list[Drawing]:
    total = findings.multiply_adds_after
    layers = [
        figures.LayerCost(
            row.label, row.share, row.multiply_adds_after / total if total and row.multiply_adds_after else None
        )
        for row in findings.rows
        if row.share is not None
    ]
    return [(figures.cost(layers), "Percent of the model's time and of its multiply-adds, by layer")] if layers else []


def _geometry(findings: Findings) -> Iterator[Drawing]:
    layers = findings.layers
    for name in figures.quantity_names(layers):
        yield figures.geometry(layers, name), f"By layer: {name}"
        if any(layer.moved(q) is not None for layer in layers for q in layer.quantities if q.name == name):
            yield figures.movements(layers, name), f"How far each value has moved since the start: {name}, by layer"


def _activations(findings: Findings) -> Iterator[Drawing]:
    images = findings.images
    for when, found in findings.activations.items():
        assert images is not None
        titles = [f"{name}: class {label}" for name, (_, label) in zip(images.names, found, strict=True)]
        figure = figures.activation(images.pictures(), [heat for heat, _ in found], titles)
        yield figure, f"Grad-CAM of the last feature map, {WHEN[when]}: {'; '.join(titles)}"
