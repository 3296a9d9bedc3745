"""PatchReport: what a patch changed, as values and as a table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .damage import Damage
from .tables import as_text, new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PatchReport", "PatchRow"]


@dataclasses.dataclass(frozen=True)
class PatchRow:
    """One replaced convolution, one shared geometry, or one other changed module.

    Attributes:
        name: module name.
        before, after: the layers, as text.
        parameters_before, parameters_after: numbers of parameters; a shared geometry is counted in its own row.
        multiply_adds_before, multiply_adds_after: for one sample; None without an input size.
        receptive_field_before, receptive_field_after: pixels of the input that an output depends on, per spatial
            dimension; None if there is no convolution.
        max_frequency: the highest frequency of the kernel, in cycles per pixel (pixels can represent up to 0.5); None
            if the method's kernels are not band-limited.
        fit_error: ||new kernel - old kernel|| / ||old kernel|| at the start, or after `tcc.refit_`; None for a random
            start.
    """

    name: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int | None = None
    multiply_adds_after: int | None = None
    receptive_field_before: tuple[int, ...] | None = None
    receptive_field_after: tuple[int, ...] | None = None
    max_frequency: float | None = None
    fit_error: float | None = None


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What a patch changed. Prints as a table.

    Attributes:
        patch: the patch, as plain values.
        rows: one per replaced convolution, shared geometry and other changed module.
        refused: selected convolutions that were not replaced, and why.
        notes: warnings about the modules around the new layers.
        no_weight_decay: names of the parameters that must have no weight decay, in the model that was given.
        parameters_before, parameters_after: of the whole model.
        multiply_adds_before, multiply_adds_after: of the whole model for one sample; None without an input size.
        multiply_adds_published: multiply_adds_after as the method's paper counts; more if this package needs fewer.
        input_size: (channels, *size) for multiply-adds.
        damage: what the patch does to the outputs for some images; None without images. Rows then stand in the order
            of their layers' damage, the worst first.
    """

    patch: dict[str, Any]
    rows: tuple[PatchRow, ...]
    refused: dict[str, str]
    notes: tuple[str, ...]
    no_weight_decay: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int | None
    multiply_adds_after: int | None
    multiply_adds_published: int | None
    input_size: tuple[int, ...] | None
    damage: Damage | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def __rich__(self) -> Table:
        table = new_table(title=f"{self.patch['layer']['method']}: {len(self.rows)} rows", show_footer=True)
        table.add_column("name", footer="whole model", no_wrap=True)
        table.add_column("before")
        table.add_column("after")
        table.add_column("parameters", footer=_change(self.parameters_before, self.parameters_after), justify="right")
        footer = _change(self.multiply_adds_before, self.multiply_adds_after)
        if self.multiply_adds_published is not None and self.multiply_adds_published != self.multiply_adds_after:
            footer += f"\n(published: {_short(self.multiply_adds_published)})"
        table.add_column("multiply-adds", footer=footer, justify="right")
        table.add_column("receptive field", justify="right")
        band_limited = any(row.max_frequency is not None for row in self.rows)
        if band_limited:
            table.add_column("cycles/pixel", justify="right")
        table.add_column("fit error", justify="right")
        if self.damage is not None:
            footer = f"sum {self.damage.sum:.3g}\nwhole {self.damage.whole:.3g}"
            if self.damage.kept is not None:
                footer += f"\ntop-1 kept {self.damage.kept:.1%}"
            table.add_column(f"damage ({self.damage.measure})", footer=footer, justify="right")
        for row in self.rows:
            table.add_row(
                row.name,
                row.before,
                row.after,
                _change(row.parameters_before, row.parameters_after),
                _change(row.multiply_adds_before, row.multiply_adds_after),
                _sizes_change(row.receptive_field_before, row.receptive_field_after),
                *(["" if row.max_frequency is None else f"{row.max_frequency:.2f}"] if band_limited else []),
                _number(row.fit_error),
                *([_number(self.damage.layers.get(row.name))] if self.damage is not None else []),
            )
        for name, reason in self.refused.items():
            table.add_row(name, "refused", reason)
        undecayed = ", ".join(sorted({name.rpartition(".")[2] for name in self.no_weight_decay}))
        decay = f"no weight decay for {undecayed} ({len(self.no_weight_decay)} parameters): see tcc.param_groups"
        table.caption = "\n".join((decay, *self.notes))
        return table

    def __str__(self) -> str:
        return as_text(self)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _change(before: int | None, after: int | None) -> str:
    return "" if before is None or after is None else f"{_short(before)} -> {_short(after)}"


def _sizes_change(before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> str:
    if after is None:
        return ""
    texts = ["×".join(map(str, sizes)) for sizes in (before, after) if sizes is not None]
    return " -> ".join(texts)


def _short(number: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / limit * (10 if unit == 'k' else 1):.2f}{unit}"
    return str(number)
