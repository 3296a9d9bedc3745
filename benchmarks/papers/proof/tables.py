"""The tables of docs/gains.md, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.common import summary

from .arms import ARMS, PLAIN
from .pairs import Difference, Group, metric, paired, reference
from .robustness import BLURS, NOISES, RESOLUTIONS, SHIFTS

__all__ = [
    "DENSE",
    "FIXED",
    "NAMES",
    "QUESTIONS",
    "accuracies",
    "changes",
    "compared",
    "decision",
    "gained",
    "geometry",
    "markdown",
    "pairs",
    "pictures",
    "receptive_fields",
    "told_of_size",
]

NAMES = {"convnext": "ConvNeXt", "resnet": "ResNet", "ccnet": "CC-Net", "flexnet": "FlexNet", "smpnet": "SmpNet"}
#: what accuracy does not show: titles of columns and where a record has them; all in percent
QUESTIONS: Mapping[str, Mapping[str, str]] = {
    "shifts": {f"by {shift}": f"robustness/shift {shift}" for shift in SHIFTS},
    "sizes": {f"{size:g}×": f"robustness/size {size}" for size in RESOLUTIONS},
    "noise and blur": {
        title: f"robustness/{title}"
        for title in (*(f"noise {noise}" for noise in NOISES), *(f"blur {blur}" for blur in BLURS))
    },
}
#: of a network whose scale or kernels follow the size of the pictures
TOLD = "told of the size"
#: constructed kernels, and dense ones of the same size
DENSE = {
    "convnext, dcls": "convnext, dense 17×17",
    "convnext, dcls_triangle": "convnext, dense 23×23",
    "convnext, dcls_gauss": "convnext, dense 23×23",
}
#: an arm with something that is learned, and the same arm with it fixed
FIXED = {
    "convnext, dcls_gauss, frozen positions": "convnext, dcls_gauss",
    "convnext, smp, frozen radii": "convnext, smp",
    "resnet, genv, σ = 0.5": "resnet, genv",
    "resnet, genv, σ = 0.83": "resnet, genv",
    "resnet, genv, σ = 1.2": "resnet, genv",
    "flexnet3, fixed size": "flexnet3",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a sentence where it would be empty."""
    if not rows:
        return "Not measured yet."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(difference: Difference | None, decimals: int = 2) -> str:
    """A mean with half of its interval's width; bold where the interval leaves out zero."""
    if difference is None:
        return "–"
    if difference.pairs == 1:
        return f"{difference.mean:+.{decimals}f} (one seed)"
    mark = "**" if difference.is_seen else ""
    return f"{mark}{difference.mean:+.{decimals}f}{mark} ± {difference.half:.{decimals}f}"


def ratio(group: Group, arm: str, other: str, path: str) -> str:
    """The mean of a value over that of another arm, of the seeds that both have."""
    values, others = group.values(arm, metric(path)), group.values(other, metric(path))
    ratios = [values[seed] / others[seed] for seed in values.keys() & others.keys()]
    return f"{statistics.mean(ratios):.2f}×" if ratios else "–"


def compared(group: Group, family: str | None = None) -> list[tuple[str, str]]:
    """Arms that have runs, with their references."""
    pairs = [(arm, reference(arm)) for arm in group.arms if family in (None, ARMS[arm].family)]
    return [(arm, other) for arm, other in pairs if other is not None and other in group.arms]


def _methods(group: Group) -> Iterator[tuple[str, list[str]]]:
    """The arm of each recipe from scratch; and its name, seeds, and gains from scratch and fine-tuned."""
    for name in group.arms:
        family, _, method = name.partition(", ")
        tuned = f"{family}, then {method}"
        if family not in ("convnext", "resnet") or tuned not in ARMS:
            continue
        gains = [
            group.difference(name, PLAIN[family], metric("accuracy")),
            group.difference(tuned, f"{family}, then plain", metric("accuracy")),
        ]
        seeds = ", ".join(str(gain.pairs) if gain else "0" for gain in gains)
        yield name, [f"`{method}` in the {NAMES[family]}", seeds, *map(cell, gains)]


def gained(group: Group) -> str:
    """One row per method: gains from scratch and fine-tuned."""
    head = ["recipe", "seeds of both", "from scratch, points", "fine-tuned, points"]
    return markdown(head, [row for _, row in _methods(group)])


def decision(group: Group) -> str:
    """One row per method: gains from scratch and fine-tuned, costs, and what else is seen."""
    rows = []
    for name, row in _methods(group):
        plain = str(reference(name))
        row += [ratio(group, name, plain, path) for path in ("seconds_per_step", "parameters")]
        row += ["; ".join(_seen(group, name, sign)) or "–" for sign in (1, -1)]
        rows.append(row)
    head = ["method", "seeds of both", "from scratch, points", "fine-tuned, points", "time of a step", "parameters"]
    return markdown([*head, "better in", "worse in"], rows)


def _seen(group: Group, arm: str, sign: int) -> list[str]:
    """By question beside accuracy, in what an arm is seen to be better or worse than its plain network."""
    other = str(reference(arm))
    asked = {question: _differences(group, arm, other, question) for question in QUESTIONS}
    asked[f"sizes, {TOLD}"] = _told_differences(group, arm, other)
    found = []
    for question, differences in asked.items():
        titles = [title for title, d in differences.items() if d is not None and d.is_seen and d.mean * sign > 0]
        if titles:
            found.append(", ".join(titles) if question == "noise and blur" else f"{question}: {', '.join(titles)}")
    return found


def _differences(group: Group, arm: str, other: str, question: str) -> dict[str, Difference | None]:
    return {title: group.difference(arm, other, metric(path)) for title, path in QUESTIONS[question].items()}


def _told_differences(group: Group, arm: str, other: str) -> dict[str, Difference | None]:
    """Of a network that was told of the pictures' size, from one that can't be; empty if this one can't be either."""
    told = told_of_size(group, arm)
    if told is None:
        return {}
    plain = [group.values(other, metric(path)) for path in QUESTIONS["sizes"].values()]
    return {title: paired(*both) for title, *both in zip(QUESTIONS["sizes"], told, plain, strict=True)}


def accuracies(group: Group, family: str, tuned: bool) -> str:
    """Accuracy, and differences from the plain network and from those with more time or parameters."""
    others = [f"{family}, 1.5 times as long", f"{family}, wider"]
    others = [] if tuned else [other for other in others if other in group.arms]
    rows = []
    for arm, records in group.arms.items():
        if ARMS[arm].family != family or bool(ARMS[arm].after) != tuned:
            continue
        plain = reference(arm)
        values = group.accuracies(arm)
        row = [arm, str(len(records)), summary(values)]
        for other in (plain, *others):
            row.append("" if other in (None, arm) else cell(group.difference(arm, str(other), metric("accuracy"))))
        row += [ratio(group, arm, plain or arm, path) for path in ("seconds_per_step", "parameters", "multiply_adds")]
        rows.append(row)
    against = [f"against {other.partition(', ')[2]}" for other in others]
    head = ["network", "seeds", "accuracy, %", "against plain", *against]
    return markdown([*head, "time of a step", "parameters", "multiply-adds"], rows)


def changes(group: Group, question: str) -> str:
    """Every arm's paired difference from its plain network; plain networks with their own values."""
    columns = QUESTIONS[question]
    rows = [_plain_row(group, arm, list(columns.values())) for arm in group.arms if reference(arm) is None]
    for arm, other in compared(group):
        rows.append(_row(arm, list(_differences(group, arm, other, question).values())))
        if question == "sizes" and (told := _told_differences(group, arm, other)):
            rows.append(_row(f"{arm}, {TOLD}", list(told.values())))
    return markdown(["network", "seeds", *columns], sorted(rows, key=lambda row: _order(row[0])))


def told_of_size(group: Group, arm: str) -> list[dict[int, float]] | None:
    """Accuracies by size and seed of a network that was told of the pictures' size; None if it can't be."""
    if not all("scaled size 2.0" in record["robustness"] for record in group.arms[arm].values()):
        return None
    return [group.values(arm, metric(f"robustness/scaled size {size}")) for size in RESOLUTIONS]


def _plain_row(group: Group, arm: str, paths: Sequence[str]) -> list[str]:
    values = [list(group.values(arm, metric(path)).values()) for path in paths]
    return [arm, str(len(group.arms[arm])), *(f"{statistics.mean(v):.1f} %" for v in values)]


def _row(title: str, differences: Sequence[Difference | None]) -> list[str]:
    seeds = max(difference.pairs if difference else 0 for difference in differences)
    return [title, str(seeds), *(cell(difference, 1) for difference in differences)]


def _order(title: str) -> int:
    return list(ARMS).index(title.removesuffix(f", {TOLD}"))


def receptive_fields(group: Group) -> str:
    """Sides and spread of the contributions to the last feature map's centre."""
    rows = []
    for arm, records in group.arms.items():
        sides = [statistics.mean(r["receptive_field"][share] for r in records.values()) for share in ("50%", "99%")]
        spread = metric("receptive_field/spread")
        other = reference(arm)
        difference = "" if other is None else cell(group.difference(arm, other, spread))
        mean = statistics.mean(group.values(arm, spread).values())
        rows.append([arm, str(len(records)), f"{mean:.2f}", difference, *(f"{side:.1f}" for side in sides)])
    return markdown(["network", "seeds", "spread", "against plain", "side of 50 %", "side of 99 %"], rows)


def geometry(group: Group) -> str:
    """By arm and quantity, one column per layer: mean before → after, and how far they moved."""
    rows = []
    for arm, records in group.arms.items():
        layers = next(iter(records.values()))["geometry"]
        for quantity in dict.fromkeys(name for shown in layers.values() for name in shown):
            cells = [
                _before_after([r["geometry"][layer][quantity] for r in records.values()])
                for layer, shown in layers.items()
                if quantity in shown
            ]
            rows.append([arm, quantity, str(len(records)), "<br>".join(cells)])
    return markdown(["network", "quantity, pixels", "seeds", "by layer, first to last"], rows)


def _before_after(changes: Sequence[Mapping[str, float]]) -> str:
    before, after, moved = (statistics.mean(c[key] for c in changes) for key in ("mean before", "mean after", "moved"))
    return f"{before:.2f} → {after:.2f} (moved {moved:.2f})"


def pairs(group: Group, arms: Mapping[str, str], head: Sequence[str]) -> str:
    """Arms, each less another: accuracy, and predictions that are kept under shifts."""
    paths = ["accuracy", *QUESTIONS["shifts"].values()]
    head = [*head, "seeds", "accuracy, points", *(f"kept, shift {title}" for title in QUESTIONS["shifts"])]
    rows = []
    for arm, other in arms.items():
        if (accuracy := group.difference(arm, other, metric("accuracy"))) is not None:
            cells = [cell(group.difference(arm, other, metric(path)), 2 if path == "accuracy" else 1) for path in paths]
            rows.append([arm, other, str(accuracy.pairs), *cells])
    return markdown(head, rows)


def pictures(all_groups: Sequence[Group]) -> str:
    """Arms that were trained with several numbers of pictures, each against its plain network."""
    arms = [arm for arm in ARMS if sum(arm in group.arms for group in all_groups) > 1]
    rows = []
    for arm in arms:
        row = [arm]
        for group in all_groups:
            values = group.accuracies(arm)
            other = reference(arm)
            if not values:
                row.append("–")
            elif other is None:
                row.append(f"{summary(values)} % ({_seeds(len(values))})")
            else:
                difference = group.difference(arm, other, metric("accuracy"))
                several = f" ({_seeds(difference.pairs)})" if difference and difference.pairs > 1 else ""
                row.append(cell(difference) + several)
        rows.append(row)
    return markdown(["network", *(f"{g.pictures:,} pictures, {g.epochs} epochs" for g in all_groups)], rows)


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
