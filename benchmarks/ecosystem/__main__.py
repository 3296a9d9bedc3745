"""Run the rows and write docs/works_with.md.

make ecosystem                              all rows, in an environment with all the libraries
python -m benchmarks.ecosystem unet pt2e    these rows again; the others stay as they were recorded
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import counters, deployment, frameworks, vision
from .rows import MODELS, Expected, Row

RESULTS = Path(__file__).parent.parent / "results" / "ecosystem.json"
PAGE = Path(__file__).parent.parent.parent / "docs" / "works_with.md"
ROWS = (*frameworks.ROWS, *vision.ROWS, *counters.ROWS, *deployment.ROWS)


def run(row: Row, name: str) -> str:
    """The text of a cell."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*weight_decay acts on")
            row(name)
    except Expected as error:
        return f"no: {error}"
    except Exception as error:
        traceback.print_exc()
        reason = str(error).strip().partition("\n")[0][:120]
        return f"**no**: {type(error).__name__}: {reason}"
    return "yes"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "# What patched models work with",
        "",
        "`make ecosystem` (benchmarks/ecosystem/) wrote this page. Each cell is a run with real steps on the CPU, of a",
        "model whose replaced layers all matter. After training, all geometry must have had a gradient, and none may",
        "be out of its bounds or decayed.",
        "",
        f"Models: {', '.join(MODELS.values())}. Python {platform.python_version()}, torch {version('torch')}, timm"
        f" {version('timm')}.",
        "",
        f"| library | what | {' | '.join(MODELS)} |",
        "|---|---|" + "---|" * len(MODELS),
    ]
    for _, row in ROWS:
        if found := results.get(row.__name__):
            lines.append(f"| {found['library']} | {row.__doc__} | {' | '.join(found['cells'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.__name__ for _, row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"rows to run; all without any: {', '.join(names)}")
    asked = parser.parse_args().rows
    if unknown := set(asked) - set(names):
        parser.error(f"ROW={unknown.pop()!r}: expected some of {', '.join(names)}")
    for package, row in ROWS:
        if asked and row.__name__ not in asked:
            continue
        cells = [run(row, name) for name in MODELS.values()]
        print(package, row.__name__, cells, flush=True)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results[row.__name__] = {"library": f"{package} {version(package)}", "cells": cells}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
