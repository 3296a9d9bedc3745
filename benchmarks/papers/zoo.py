"""Patch a model of every family in timm with every method, and write what happened to docs/zoo.md.

    python -m benchmarks.papers.zoo                   # all families: about half an hour on two cores
    python -m benchmarks.papers.zoo --family convnext --family resnet

Of each family the smallest model that has such convolutions is taken, with random weights. A patch counts where the
output keeps its shape and is finite, a gradient reaches every new parameter, and `tcc.merge` gives the same output.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from rich.progress import track
from torch.nn.modules.conv import _ConvNd

from benchmarks.common import RESULTS, ROOT, arguments, new_parser
from benchmarks.papers.promises import check, sample
from timm_contconv.patching.select import PRESETS

RECIPES = {
    "depthwise": ("dcls_gauss", "smp", "flex"),
    "strided": ("genv", "cc"),
}
RECORD, PAGE = RESULTS / "zoo.json", ROOT / "docs" / "zoo.md"
#: what became of one model under one recipe: family, model, recipe, and the fields of `Outcome`
Row = dict[str, Any]


def families() -> list[str]:
    """Modules of timm itself that register architectures."""
    return [family for family in timm.list_modules() if importlib.util.find_spec(f"timm.models.{family}") is not None]


def smallest(family: str, rule: Callable[[_ConvNd], bool]) -> str | None:
    """The model of a family with the fewest parameters among those that have such a convolution."""
    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name)
        if any(isinstance(module, _ConvNd) and rule(module) for module in model.modules()):
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else None


def visit(family: str) -> list[Row]:
    """Every recipe on the models of a family that it applies to."""
    rows = []
    for preset, recipes in RECIPES.items():
        name = smallest(family, PRESETS[preset])
        if name is None:
            continue
        for recipe in recipes:
            torch.manual_seed(0)
            model = timm.create_model(name)
            outcome = check(model, recipe, sample(model))
            rows.append({"family": family, "model": name, "recipe": recipe, **dataclasses.asdict(outcome)})
    return rows


def page(found: Sequence[Row], without: Sequence[str]) -> str:
    """The tables as a page of the documentation."""
    lines = [
        "# Every family of timm",
        "",
        f"`make zoo` (`python -m benchmarks.papers.zoo`) patched, with timm {timm.__version__}, the smallest model of"
        " each family that has such convolutions, with random weights. For each it checked: the same output shape,"
        " finite outputs, a gradient at every new parameter, the same output after `tcc.merge` (to 1e-4). A cell says"
        " how many convolutions were replaced and, in brackets, the median relative error of the warm start's kernels.",
        "",
    ]
    for preset, recipes in RECIPES.items():
        lines += table(preset, recipes, [row for row in found if row["recipe"] in recipes])
    return "\n".join([*lines, f"Families without either: {', '.join(without)}.", ""])


def table(preset: str, recipes: Sequence[str], found: Sequence[Row]) -> list[str]:
    """The lines of one table: a row per model, a column per recipe."""
    models: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found:
        models.setdefault((row["family"], row["model"]), {})[row["recipe"]] = row
    lines = [f"## {preset.capitalize()} convolutions: {len(models)} families", ""]
    lines += [f"| family | model | {' | '.join(recipes)} | refused |", "|---" * (len(recipes) + 3) + "|"]
    for (family, model), by_recipe in models.items():
        cells = [_cell(by_recipe[recipe]) for recipe in recipes]
        refused = {reason: n for row in by_recipe.values() for reason, n in row["refused"].items()}
        reasons = "; ".join(f"{n}: {reason}" for reason, n in refused.items())
        lines.append(f"| {family} | {model} | {' | '.join(cells)} | {reasons} |")
    return [*lines, ""]


def _cell(row: Row) -> str:
    return f"{row['replaced']} ({row['fit_error']:.0e})" if row["fit_error"] is not None else "0"


def record(family: str, rows: list[Row]) -> None:
    """Add what was found for a family to the record, read anew as several processes may share the families."""
    results: dict[str, list[Row]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    results = dict(sorted({**results, family: rows}.items()))
    RECORD.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    without = [family for family, found in results.items() if not found]
    PAGE.write_text(page([row for found in results.values() for row in found], without), encoding="utf-8")


def main() -> None:
    parser = new_parser(__doc__, threads=torch.get_num_threads())
    parser.add_argument("--family", action="append", help="only these; the others' results stay")
    options = arguments(parser)
    warnings.filterwarnings("ignore", category=UserWarning, module="timm")
    failed = []
    for family in track(options.family or families(), description="families"):
        try:
            rows = visit(family)
        except Exception as error:  # one family's failure is a line of the outcome, not the end of the run
            failed.append(f"{family}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        print(*rows, sep="\n", flush=True)
        record(family, rows)
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} failures", *failed]))


if __name__ == "__main__":
    main()
