"""The report as one HTML file, from the template, the style and the script in `assets/`, with Vega inside."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure of a section.

    Attributes:
        figure: what is drawn.
        text: what it shows, for the caption and for screen readers.
    """

    figure: figures.Figure
    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: of its heading.
        title: its heading.
        look_for: one sentence that says what to look for.
        source: the paper's figure that shows the same; "" if there is none.
        drawings: its figures.
    """

    id: str
    title: str
    look_for: str
    source: str
    drawings: tuple[Drawing, ...]


def page(findings: Findings) -> str:
    """The whole page."""
    entries, arrays = gallery(findings.layers)
    sections = list(_sections(findings))
    specs = [drawing.figure.to_dict() for section in sections for drawing in section.drawings]
    panels = {
        "kernel": figures.Figure(kernel_panel("pixels", "dots", "outlines", 250)).to_dict(),
        "spectrum": figures.Figure(spectrum_panel("pixels", "circle", "nyquist", 250)).to_dict(),
    }
    columns, rows = _table(findings)
    return _template().render(
        findings=findings,
        sections=sections,
        facts=_facts(findings),
        columns=columns,
        rows=rows,
        squares=_squares(findings),
        style=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),
        script=Markup((ASSETS / "report.js").read_text(encoding="utf-8")),
        vega=Markup(_vega().replace("</script", "<\\/script")),
        specs=_json(specs),
        panels=_json(panels),
        entries=_json(entries),
        arrays=Markup(arrays),
        has_start=any(layer.start is not None for layer in findings.layers),
        labels={layer.name: layer.label for layer in findings.layers},
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


def _facts(findings: Findings) -> dict[str, str]:
    """The head of the page: a few numbers by name."""
    time = findings.time
    facts = {
        "layers of timm_contconv": str(len(findings.layers)),
        "parameters": _change(findings.parameters_before, findings.parameters_after),
        "multiply-adds": _change(findings.multiply_adds_before, findings.multiply_adds_after),
    }
    if time is not None:
        spent = sum(layer.share for layer in time.layers.values())
        shape = "×".join(map(str, time.input_shape))
        facts["forward pass"] = duration(time.seconds)
        facts["of it in these layers"] = f"{spent:.0%}"
        facts["measured on"] = f"{time.device}, {time.threads} thread{'s' * (time.threads > 1)}, input {shape}"
    return {name: text for name, text in facts.items() if text}


#: a cell of the table: text, and what its column is sorted by
Cell = tuple[str, str | float | None]
#: the table's columns: heading, and whether they hold numbers
COLUMNS = (
    ("layer", False),
    ("before", False),
    ("now", False),
    ("parameters", True),
    ("multiply-adds", True),
    ("receptive field", True),
    ("fit error", True),
    ("time", True),
    ("share of time", True),
    ("algorithm", False),
)


def _table(findings: Findings) -> tuple[list[tuple[str, bool]], list[list[Cell]]]:
    """The columns and the rows of the table, without columns that are empty."""
    rows = [_cells(row) for row in findings.rows]
    used = [index for index in range(len(COLUMNS)) if any(row[index][0] for row in rows)]
    return [COLUMNS[index] for index in used], [[row[index] for index in used] for row in rows]


def _cells(row: LayerRow) -> list[Cell]:
    """The cells of a row: text, and what the column is sorted by."""
    field = row.receptive_field
    return [
        (row.name, row.name),
        (row.before, row.before),
        (row.after, row.after),
        (_change(row.parameters_before, row.parameters_after), row.parameters_after),
        (_change(row.multiply_adds_before, row.multiply_adds_after), row.multiply_adds_after),
        ("" if field is None else "×".join(map(str, field)), None if field is None else max(field)),
        ("" if row.fit_error is None else f"{row.fit_error:.2g}", row.fit_error),
        (duration(row.seconds), row.seconds),
        ("" if row.share is None else f"{row.share:.1%}", row.share),
        (row.algorithm, row.algorithm),
    ]


def _squares(findings: Findings) -> list[tuple[str, list[str]]]:
    """For each receptive field: when, and side and area of the squares that hold parts of it."""
    return [
        (when, [f"{field.square(share)} pixels ({field.area(share):.1%} of the image)" for share in SHARES])
        for when, field in findings.receptive_fields.items()
    ]


# ---- sections


def _sections(findings: Findings) -> Iterator[Section]:
    makers = (_cost, _geometry, _footprints, _frequencies, _receptive_fields, _activations)
    for make in makers:
        section = make(findings)
        if section.drawings:
            yield section


def _cost(findings: Findings) -> Section:
    total = findings.multiply_adds_after
    layers = [
        figures.LayerCost(
            row.label, row.share, row.multiply_adds_after / total if total and row.multiply_adds_after else None
        )
        for row in findings.rows
        if row.share is not None
    ]
    drawing = Drawing(figures.cost(layers), "Percent of the model's time and of its multiply-adds, by layer")
    return Section(
        "cost",
        "Cost by layer",
        "Look for layers whose part of the time is larger than their part of the multiply-adds: there the algorithm or"
        " the memory is the limit, not arithmetic.",
        "",
        (drawing,) if layers else (),
    )


def _geometry(findings: Findings) -> Section:
    drawings, sources = [], []
    for name in figures.quantity_names(findings.layers):
        quantities = [(layer, q) for layer in findings.layers for q in layer.quantities if q.name == name]
        sources += [q.source for _, q in quantities if q.source]
        drawings.append(Drawing(figures.geometry(findings.layers, name), f"By layer: {name}"))
        if any(layer.moved(q) is not None for layer, q in quantities):
            text = f"How far each value has moved since the start: {name}, by layer"
            drawings.append(Drawing(figures.movements(findings.layers, name), text))
    return Section(
        "geometry",
        "Geometry by depth",
        "Look for a trend from the first layer (top) to the last: do kernels widen with depth? Bars hold the middle"
        " half of the values, lines 90 % of them, the dark mark is the median.",
        "; ".join(dict.fromkeys(sources)),
        tuple(drawings),
    )


def _footprints(findings: Findings) -> Section:
    drawing = Drawing(
        figures.footprints(findings.layers), "Mean of the absolute kernels of each layer, one scale for all"
    )
    return Section(
        "footprints",
        "Where kernels are large",
        "Look for how much of a large kernel is used, and whether it is used evenly: the mean of the absolute kernels"
        " of each layer, from white (0) to dark (the layer's largest).",
        "Kim and Park 2023, Fig. 5",
        (drawing,),
    )


def _frequencies(findings: Findings) -> Section:
    drawing = Drawing(
        figures.frequencies(findings.layers), "Frequency below which 95 % of a kernel's power lies, by layer"
    )
    known = any(layer.highest_frequency is not None for layer in findings.layers)
    limits = " and diamonds (f⁺, the highest frequency that the kernel's function can hold)" * known
    return Section(
        "frequencies",
        "Frequencies by depth",
        "Look for kernels beyond the dashed line (Nyquist, 0.5 cycles per pixel)"
        f"{limits}: sampled at another resolution, they alias. Bars hold the middle half of a layer's kernels.",
        "Romero et al. 2022, Fig. 8",
        (drawing,),
    )


def _receptive_fields(findings: Findings) -> Section:
    titles = {"start": "before", "now": "now"}
    drawings = tuple(
        Drawing(
            figures.receptive_field(field, titles[when]),
            f"Effective receptive field, {titles[when]}: 99 % of the contributions lie in a square of"
            f" {field.square(0.99)} pixels",
        )
        for when, field in findings.receptive_fields.items()
    )
    count = next((field.images for field in findings.receptive_fields.values()), 0)
    source = "" if findings.images is None else findings.images.source
    return Section(
        "receptive-field",
        "Effective receptive field",
        f"Look for how far from the centre the last feature map still depends on the image; the mean over {count}"
        f" {source}. The squares, from the inside, hold 20, 50 and 99 % of the contributions.",
        "Luo et al. 2016; squares as in Ding et al. 2022 (RepLKNet)",
        drawings,
    )


def _activations(findings: Findings) -> Section:
    images = findings.images
    drawings = []
    for when, found in findings.activations.items():
        assert images is not None
        titles = [f"{name}: class {label}" for name, (_, label) in zip(images.names, found, strict=True)]
        figure = figures.activation(images.pictures(), [heat for heat, _ in found], titles)
        text = "before" if when == "start" else "now"
        drawings.append(Drawing(figure, f"Grad-CAM of the last feature map, {text}: {'; '.join(titles)}"))
    return Section(
        "activation",
        "Class activation",
        "Look for whether the object, and not its surroundings, makes the model decide (orange) for its class.",
        "Selvaraju et al. 2017; Kobayashi 2023, Fig. 6",
        tuple(drawings),
    )
