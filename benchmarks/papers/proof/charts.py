"""The charts of docs/gains.md: one per question."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .arms import ARMS
from .pairs import FEWEST, Group, metric
from .robustness import RESOLUTIONS, SHIFTS
from .tables import FIXED, NAMES, QUESTIONS, compared, told_of_size

__all__ = ["CHARTS"]

#: what the geometry's chart shows, one panel each: an arm and a quantity
PANELS = (
    ("convnext, dcls_gauss", "width σ of elements"),
    ("convnext, smp", "radius of points"),
    ("convnext, flex", "size of the mask"),
    ("resnet, genv", "σ of envelopes"),
)
SHOWN_FAMILIES = ("convnext", "resnet")


def accuracy(group: Group, path: Path) -> bool:
    """Paired differences with intervals, one panel per family; from scratch filled, fine-tuned hollow."""
    families = [family for family in NAMES if compared(group, family)]
    if not families:
        return False
    heights = [max(2, len(compared(group, family))) for family in families]
    figure = Figure(figsize=(9, 1 + 0.28 * sum(heights) + 0.6 * len(heights)), layout="constrained")
    panels = figure.subplots(len(families), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, family in zip(panels, families, strict=True):
        rows = compared(group, family)
        for height, (arm, other) in enumerate(reversed(rows)):
            difference = group.difference(arm, other, metric("accuracy"))
            if difference is not None:
                reach = difference.half if difference.pairs >= FEWEST else 0
                colour = "tab:blue" if difference.is_seen else "gray"
                fill = "none" if ARMS[arm].after else "full"
                panel.errorbar(difference.mean, height, xerr=reach, fmt="o", color=colour, fillstyle=fill, capsize=3)
        panel.set_yticks(range(len(rows)), [arm.partition(", ")[2] or arm for arm, _ in reversed(rows)], fontsize=8)
        panel.set_ylim(-0.6, len(rows) - 0.4)
        panel.axvline(0, color="gray", linewidth=0.8)
        panel.set_title(f"{NAMES[family]}: accuracy against plain, points", fontsize=9)
    figure.savefig(path, dpi=120)
    return True


def sizes(group: Group, path: Path) -> bool:
    """Accuracy against the size of the pictures."""

    def draw(panel: Axes, family: str) -> None:
        for arm in _from_scratch(group, family):
            (line,) = panel.plot(RESOLUTIONS, _means(group, arm, "sizes"), "o-", label=_short(arm), markersize=3)
            if (told := told_of_size(group, arm)) is not None:
                means = [statistics.mean(values.values()) for values in told]
                panel.plot(
                    RESOLUTIONS, means, "s--", color=line.get_color(), label=f"{_short(arm)}, told", markersize=3
                )
        panel.set(
            title=NAMES[family],
            xlabel="size of the pictures / size in training",
            xticks=RESOLUTIONS,
            ylabel="accuracy, %",
        )

    return _by_family(group, path, draw)


def shifts(group: Group, path: Path) -> bool:
    """Share of predictions that a shift does not change."""

    def draw(panel: Axes, family: str) -> None:
        for arm in _from_scratch(group, family):
            panel.plot(SHIFTS, _means(group, arm, "shifts"), "o-", label=_short(arm), markersize=3)
        panel.set(title=NAMES[family], xlabel="shift, pixels", ylabel="same top-1, %", xticks=SHIFTS)

    return _by_family(group, path, draw)


def _by_family(group: Group, path: Path, draw: Callable[[Axes, str], None]) -> bool:
    families = [family for family in SHOWN_FAMILIES if _from_scratch(group, family)]
    if not families:
        return False
    figure = Figure(figsize=(5 * len(families), 4.8), layout="constrained")
    for panel, family in zip(figure.subplots(1, len(families), squeeze=False)[0], families, strict=True):
        panel.set_prop_cycle(color=["black", *colormaps["tab10"].colors])
        draw(panel, family)
        panel.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=120)
    return True


def _from_scratch(group: Group, family: str) -> list[str]:
    """The plain network, and the arms that start like it; no controls, which would crowd a chart."""
    return [arm for arm in group.arms if ARMS[arm].family == family and not ARMS[arm].after and not _is_control(arm)]


def _is_control(arm: str) -> bool:
    return arm in FIXED or arm.endswith((", 1.5 times as long", ", wider"))


def _means(group: Group, arm: str, question: str) -> list[float]:
    return [statistics.mean(group.values(arm, metric(path)).values()) for path in QUESTIONS[question].values()]


def _short(arm: str) -> str:
    return arm.partition(", ")[2] or "plain"


def geometry(group: Group, path: Path) -> bool:
    """Means and deviations by depth, before (gray) and after."""
    shown = [(arm, quantity) for arm, quantity in PANELS if arm in group.arms]
    if not shown:
        return False
    figure = Figure(figsize=(3 * len(shown), 3), layout="constrained")
    for panel, (arm, quantity) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        records = list(group.arms[arm].values())
        layers = [layer for layer, names in records[0]["geometry"].items() if quantity in names]
        for when, colour, offset in (("before", "gray", -0.08), ("after", "tab:blue", 0.08)):
            means, deviations = (
                [statistics.mean(r["geometry"][layer][quantity][f"{kind} {when}"] for r in records) for layer in layers]
                for kind in ("mean", "deviation")
            )
            depth = [index + 1 + offset for index in range(len(layers))]
            panel.errorbar(depth, means, yerr=deviations, fmt="o", color=colour, label=when, capsize=2, markersize=4)
        panel.set(xlabel="layer", ylabel=f"{quantity}, pixels", xticks=range(1, len(layers) + 1))
        panel.set_title(f"{arm} ({len(records)} seeds)", fontsize=8)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return True


#: by question: draws a chart of a group's runs, unless there are none
CHARTS: dict[str, Callable[[Group, Path], bool]] = {
    "accuracy": accuracy,
    "sizes": sizes,
    "shifts": shifts,
    "geometry": geometry,
}
