"""tcc.inspect: look at what a model's kernels learned."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..patching import PatchReport, merge, report
from ..patching.copies import copy_without_hooks
from ..patching.record import get_record
from ..patching.report import count_multiply_adds
from ..progress import progress_bar
from .findings import Findings, LayerRow
from .images import Images, ImagesGiven, load_images
from .receptive_field import SHARES, ReceptiveField, effective_receptive_field
from .shown import ShownLayer, labels, layers_of, shown_layers
from .timing import ModelTime, measure_times
from .writing import check_writable, write_whole

__all__ = ["Inspect", "Inspection"]

NOTEBOOK_HEIGHT = 900


class Inspection(Findings):
    """What `tcc.inspect` found, and its page. Notebooks show it."""

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the report, as plain values for JSON."""
        fields = {
            when: {f"{round(100 * share)} %": field.square(share) for share in SHARES}
            for when, field in self.receptive_fields.items()
        }
        keys = ("title", "parameters_before", "parameters_after", "multiply_adds_before", "multiply_adds_after")
        return {
            **{key: getattr(self, key) for key in keys},
            "seconds": None if self.time is None else self.time.seconds,
            "layers": [dataclasses.asdict(row) for row in self.rows],
            "receptive_field": fields,
            "left_out": dict(self.left_out),
        }

    def to_html(self) -> str:
        """The report as one HTML file that needs nothing else."""
        from .page import page

        return page(self)

    def save(self, path: str | Path) -> Path:
        """Write the report.

        Args:
            path: of the .html file.

        Raises:
            OSError: the file can't be written; nothing is left of it.
        """
        path = Path(path)
        check_writable(path)
        return write_whole(path, self.to_html().encode())

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        style = f"width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"
        return f'<iframe title="{html.escape(self.title)}" style="{style}" srcdoc="{page}"></iframe>'


class Inspect:
    """`tcc.inspect(model)`, which also leads to `tcc.inspect.figures`, because the package has the same name."""

    @property
    def figures(self) -> ModuleType:
        """The figures of a report as functions of a model. They need the extra `viz`."""
        from . import figures

        return figures

    def __call__(
        self,
        model: nn.Module,
        images: ImagesGiven | None = None,
        *,
        start: nn.Module | None = None,
        progress: bool | None = None,
    ) -> Inspection:
        """Look at what a model's kernels learned: `save` gives one HTML file with tables and figures.

        The model is not changed. A copy of it runs, in eval mode.

        Args:
            model: a model that holds layers of this package, patched or not.
            images: for the receptive field and class activations: (N, C, H, W), normalised as the model takes them,
                or PIL images, or a folder of image files; the first 8 are used. Default: photographs of scikit-image.
            start: the model before its patch or its training, for comparison. Default: for kernels and geometry, what
                the patch recorded when it fitted them.
            progress: whether a progress bar is shown; None shows it on a terminal only.

        Raises:
            ImportError: the extra `viz` is not installed.
            ValueError: the model holds no layer of this package or has no values; or images can't be read.
        """
        _require_viz()
        return _Inspector(model, start, progress).run(images)


def _require_viz() -> None:
    missing = [name for name in ("jinja2", "vl_convert") if find_spec(name) is None]
    if missing:
        raise ImportError(f"tcc.inspect needs {' and '.join(missing)}: pip install timm_contconv[viz]")


class _Inspector:
    """One run of `tcc.inspect`."""

    def __init__(self, model: nn.Module, start: nn.Module | None, progress: bool | None) -> None:
        layers_of(model)  # raises
        self.model, self.start, self.progress = model, start, progress
        self.left_out: dict[str, str] = {}

    def run(self, images: ImagesGiven | None) -> Inspection:
        loaded = self._images(images)
        copies = {"now": _runnable(self.model)}
        if self.start is not None:
            copies = {"start": _runnable(self.start), **copies}
        shown = shown_layers(copies["now"], self.start)
        fields: dict[str, ReceptiveField] = {}
        activations: dict[str, list[tuple[Tensor, int]]] = {}
        time = None
        if loaded is not None:
            steps = 1 + len(copies) * (len(loaded.batch) + 1)
            with progress_bar("times", steps, self.progress) as advance:
                time = measure_times(copies["now"], layers_of(copies["now"]), loaded.batch[:1])
                advance(text="effective receptive field")
                fields = self._fields(copies, loaded.batch, advance)
                for when, model in copies.items():
                    advance(0, "class activation")
                    activations |= self._activations(when, model, loaded.batch)
                    advance()
        if self.start is None:
            self.left_out["comparison"] = (
                "the receptive field and the class activation of the model before its patch or training are left out:"
                " give that model as start=..., on the command line --start"
            )
        return self._inspection(shown, time, loaded, fields, activations)

    def _images(self, images: ImagesGiven | None) -> Images | None:
        """The images; without given ones, None if the model takes no photographs."""
        try:
            return load_images(self.model, images)
        except ValueError as error:
            if images is not None:
                raise
            self.left_out["images"] = f"times, receptive field and class activation are left out: {error}"
            return None

    def _fields(
        self, copies: dict[str, nn.Module], batch: Tensor, advance: Callable[[], None]
    ) -> dict[str, ReceptiveField]:
        fields = {}
        for when, model in copies.items():
            try:
                fields[when] = effective_receptive_field(model, batch, advance)
            except ValueError as error:
                self.left_out["receptive field"] = f"the effective receptive field is left out: {error}"
        return fields

    def _activations(self, when: str, model: nn.Module, batch: Tensor) -> dict[str, list[tuple[Tensor, int]]]:
        if find_spec("captum") is None:
            self.left_out["activation"] = "class activation is left out: it needs captum: pip install captum"
            return {}
        from .activation import class_activations

        try:
            return {when: class_activations(model, batch)}
        except ValueError as error:
            self.left_out["activation"] = f"class activation is left out: {error}"
            return {}

    def _inspection(
        self,
        shown: list[ShownLayer],
        time: ModelTime | None,
        images: Images | None,
        fields: dict[str, ReceptiveField],
        activations: dict[str, list[tuple[Tensor, int]]],
    ) -> Inspection:
        changes = None
        if get_record(self.model) is not None:
            changes = report(self.model, None if time is None else time.input_shape[1:])
        return Inspection(
            title=_title(self.model),
            parameters_before=None if changes is None else changes.parameters_before,
            parameters_after=sum(p.numel() for p in self.model.parameters()),
            multiply_adds_before=None if changes is None else changes.multiply_adds_before,
            multiply_adds_after=self._multiply_adds(time) if changes is None else changes.multiply_adds_after,
            rows=tuple(_rows(self.model, changes, time)),
            layers=tuple(shown),
            time=time,
            images=images,
            receptive_fields=fields,
            activations=activations,
            left_out=self.left_out,
        )

    def _multiply_adds(self, time: ModelTime | None) -> int | None:
        """Of a model that was not patched, for one sample; None if there is no input, or no merged model."""
        if time is None:
            return None
        try:
            merged = merge(copy_without_hooks(self.model).to("meta"), inplace=True)
        except ValueError as error:
            self.left_out["multiply-adds"] = f"multiply-adds are left out, since the model can't be merged: {error}"
            return None
        total, _ = count_multiply_adds(merged, time.input_shape[1:], ())
        return total


def _title(model: nn.Module) -> str:
    """The model's architecture, and how it was patched by hand."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = str(config.get("architecture") or type(model).__name__)
    record = get_record(model)
    if record is None or record.architecture is not None:
        return name
    return f"{name}, patched with {record.spec.layer.method}"


def _runnable(model: nn.Module) -> nn.Module:
    """A copy in eval mode, whose parameters need no gradients."""
    return copy_without_hooks(model).eval().requires_grad_(False)


def _rows(model: nn.Module, changes: PatchReport | None, time: ModelTime | None) -> Iterator[LayerRow]:
    """The rows of the patch's report, or one per layer, with measured times."""
    layers = layers_of(model)
    short = labels(list(layers))
    times = {} if time is None else time.layers
    if changes is None:
        for name, layer in layers.items():
            of = times.get(name)
            known: dict[str, Any] = {
                "before": "",
                "after": layer.summary(),
                "parameters_before": None,
                "parameters_after": sum(p.numel() for p in layer.parameters()),
                "multiply_adds_before": None,
                "multiply_adds_after": None if of is None else layer.multiply_adds(of.output_size),
                "receptive_field": layer.receptive_field(),
                "fit_error": None,
            }
            yield LayerRow(name, short[name], **known, **_measured(time, name))
        return
    same = ("before", "after", "parameters_before", "parameters_after", "multiply_adds_before", "multiply_adds_after")
    for row in changes.rows:
        known = {key: getattr(row, key) for key in (*same, "fit_error")}
        known["receptive_field"] = row.receptive_field_after
        yield LayerRow(row.name, short.get(row.name, row.name), **known, **_measured(time, row.name))


def _measured(time: ModelTime | None, name: str) -> dict[str, Any]:
    of = None if time is None else time.layers.get(name)
    if of is None:
        return {"seconds": None, "share": None, "algorithm": ""}
    return {"seconds": of.seconds, "share": of.share, "algorithm": of.algorithm}
