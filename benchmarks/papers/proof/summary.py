"""Write docs/gains.md's tables and charts, and a table of docs/which_method.md, from the runs that are recorded.

    python -m benchmarks.papers.proof.summary [--runs benchmarks/results/proof.jsonl] [--page docs/gains.md]

A table or chart without runs says so. Texts between the tables are written by hand and stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write_block

from .charts import CHARTS
from .pairs import Group, groups
from .run import RECORDED, recorded
from .tables import (
    DENSE,
    FIXED,
    NAMES,
    accuracies,
    changes,
    decision,
    gained,
    geometry,
    pairs,
    pictures,
    receptive_fields,
)

PAGE, CHOICE = ROOT / "docs" / "gains.md", ROOT / "docs" / "which_method.md"
TITLES = {
    "accuracy": "Differences in accuracy from the plain network, with 95 % intervals",
    "sizes": "Accuracy against the size of the pictures",
    "shifts": "Share of predictions that a shift keeps",
    "geometry": "Widths, radii, masks and envelopes before and after training, by layer",
}


def blocks(all_groups: Sequence[Group]) -> dict[str, str]:
    """The page's tables, by the names in its markers."""
    main = all_groups[0] if all_groups else Group(0, 0, {})
    tables = {
        "decision": decision(main),
        "shifts": changes(main, "shifts"),
        "sizes": changes(main, "sizes"),
        "noise and blur": changes(main, "noise and blur"),
        "receptive fields": receptive_fields(main),
        "geometry": geometry(main),
        "constructed or dense": pairs(main, DENSE, ["constructed", "dense"]),
        "learned or fixed": pairs(main, FIXED, ["fixed", "learned"]),
        "pictures": pictures(all_groups),
    }
    for family in NAMES:
        tables[f"{family} from scratch"] = accuracies(main, family, tuned=False)
    for family in ("convnext", "resnet"):
        tables[f"{family} fine-tuned"] = accuracies(main, family, tuned=True)
    return tables


def state(records: Sequence[dict[str, Any]], all_groups: Sequence[Group]) -> str:
    """What is recorded: how many runs, of what schedule, on which machine."""
    if not all_groups:
        return "No run is recorded yet."
    main = all_groups[0]
    seeds = span([len(runs) for runs in main.arms.values()], "d")
    machines = sorted({f"{r['machine']['processor']}, PyTorch {r['machine']['torch']}" for r in records})
    parts = [
        f"{len(records)} runs are recorded, on {' and '.join(machines)}.",
        f"Tables are of {main.pictures:,} training pictures and {main.epochs} epochs, where they name no others.",
        f"Networks: {len(main.arms)}. Seeds of each: {seeds}.",
    ]
    for family in ("convnext", "resnet"):
        values = main.accuracies(family)
        if values:
            parts.append(f"The plain {NAMES[family]} reaches {span(values, '.1f')} %.")
    return " ".join(parts)


def span(values: Sequence[float], form: str) -> str:
    """The smallest and the largest value, or the one that there is."""
    return " to ".join(dict.fromkeys(format(end, form) for end in (min(values), max(values))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RECORDED)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    try:
        records = recorded(options.runs)
    except ValueError as error:
        parser.error(str(error))
    all_groups = groups(records)
    found = {"state": state(records, all_groups), **blocks(all_groups)}
    for name, draw in CHARTS.items():
        path = options.page.parent / "images" / f"gains_{name}.png"
        is_drawn = bool(all_groups) and draw(all_groups[0], path)
        found[f"{name} chart"] = f"![{TITLES[name]}](images/{path.name})" if is_drawn else "No chart yet."
    for name, content in found.items():
        write_block(options.page, f"<!-- proof: {name} -->", [content])
    if options.page == PAGE and all_groups:
        write_block(CHOICE, "<!-- proof: gained -->", [gained(all_groups[0])])
    print(f"{options.page}: of {len(records)} runs, {sum(len(group.arms) for group in all_groups)} networks")


if __name__ == "__main__":
    main()
