"""The table of docs/speed.md: what the other scripts measured, one column per machine, beside what was aimed at.

    python -m benchmarks.speed.targets

Every folder in benchmarks/results is a machine's. What was not measured there says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, write_block

PAGE, START = ROOT / "docs" / "speed.md", "<!-- benchmarks.speed.targets -->"
AT_MOST, AT_LEAST = "≤", "≥"
UNKNOWN = "not measured"

Results = dict[str, Any]


def part(results: Results, work: str, one: str, other: str) -> float:
    """Of convnext.json: the time of one contender over that of another."""
    ratio: float = results[work][one] / results[work][other]
    return ratio


def worst_halved(results: Results, work: str) -> float:
    """Of cc_speed.json: the largest ratio of the single layers whose plain convolution takes 0.3 ms and more."""
    rows = [row for key, row in results.items() if key.startswith("scale 1/2") and key.endswith(work)]
    worst: float = max(row["ratio"] for row in rows if row["second_ms"] >= 0.3)
    return worst


def layer_gains(results: Results, passes: tuple[str, ...]) -> list[float]:
    """Of depthwise.json: PyTorch's time in its better layout over ours, for every layer and layout of ours."""
    layers: dict[tuple[Any, ...], list[tuple[float, float, float]]] = {}
    for row in results["rows"]:
        if row["pass"] in passes and row["kernel"] >= 13:
            key = row["channels"], row["kernel"], row["layout"]
            times = row["ms"], row["plain_contiguous_ms"], row["plain_channels_last_ms"]
            layers.setdefault(key, []).append(times)
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in layers.values()]
    return [min(plain) / ours for ours, *plain in sums]


def model_gain(results: Results, model: str, work: str) -> list[float]:
    """Of engine.json: the gain in the plain model's better layout, and the least in both."""
    rows = [row for key, row in results[model].items() if key.startswith(work)]
    ratios = {row["seconds"]["plain"]: row["plain / engine"]["ratio"] for row in rows}
    return [ratios[min(ratios)], min(ratios.values())]


def merged_time(results: Results, model: str) -> float:
    """Of engine.json: the time of the merged model with `engine` over the patched one's, the larger of both layouts."""
    return max(1 / row["patched / engine"]["ratio"] for row in results[model].values())


GAUSS, BILINEAR, PLAIN, PACKAGE = "timm_contconv", "timm_contconv, bilinear 17x17", "plain 7x7", "DCLS package"
CC = "scale 0.61, support 4, interpolating net (16 features), inference"
#: what; script; then for each figure its name, the target, and how it follows from the script's results
ROWS: list[tuple[str, str, list[tuple[str, str, float, Callable[[Results], float]]]]] = [
    (
        "`convnext_tiny_dcls_gauss` against the plain model",
        "convnext",
        [
            ("training step", AT_MOST, 1.02, lambda r: part(r, "training step", GAUSS, PLAIN)),
            ("inference", AT_MOST, 1.10, lambda r: part(r, "inference", GAUSS, PLAIN)),
            ("compiled step", AT_MOST, 1.02, lambda r: part(r, "compiled training step", GAUSS, PLAIN)),
        ],
    ),
    (
        "`convnext_tiny_dcls` (bilinear, 17×17) against the plain model",
        "convnext",
        [
            ("training step", AT_MOST, 0.96, lambda r: part(r, "training step", BILINEAR, PLAIN)),
            ("inference", AT_MOST, 1.05, lambda r: part(r, "inference", BILINEAR, PLAIN)),
        ],
    ),
    (
        "`convnext_tiny_dcls_gauss`, times as fast as the authors' `DCLS`",
        "convnext",
        [
            ("training step", AT_LEAST, 11, lambda r: part(r, "training step", PACKAGE, GAUSS)),
            ("inference", AT_LEAST, 16, lambda r: part(r, "inference", PACKAGE, GAUSS)),
        ],
    ),
    (
        "depthwise passes, chosen algorithm against the best one, after measuring",
        "choice",
        [
            ("median", AT_MOST, 1.03, lambda r: r["summary"]["measured, all"]["median"]),
            ("worst", AT_MOST, 1.25, lambda r: r["summary"]["measured, all"]["worst"]),
        ],
    ),
    (
        "the same, without measuring",
        "choice",
        [
            ("median", AT_MOST, 1.10, lambda r: r["summary"]["prior, all"]["median"]),
            ("worst", AT_MOST, 2.0, lambda r: r["summary"]["prior, all"]["worst"]),
        ],
    ),
    (
        "what measuring costs, and Python in a short call",
        "overhead",
        [
            (
                "share of 200 training steps, %",
                AT_MOST,
                3,
                lambda r: 100 * r["measuring, seconds"]["share of 200 steps"],
            ),
            ("µs", AT_MOST, 15, lambda r: r["short call, microseconds"]["Python"]),
        ],
    ),
    (
        "depthwise layers of 13×13 to 31×31, times as fast as PyTorch in its better layout, the least of all",
        "depthwise --kernels 13 23 31",
        [
            ("inference", AT_LEAST, 1, lambda r: min(layer_gains(r, ("output",)))),
            ("training", AT_LEAST, 5, lambda r: min(layer_gains(r, ("output", "input", "weight")))),
        ],
    ),
    *(
        (
            f"`engine` on plain `{model}`, times as fast, in the better layout; the lesser of both",
            "engine",
            [
                ("training step", AT_LEAST, target, lambda r, m=model: model_gain(r, m, "training step")[0]),
                ("lesser", AT_LEAST, 1, lambda r, m=model: model_gain(r, m, "training step")[1]),
                ("inference", AT_LEAST, 1, lambda r, m=model: model_gain(r, m, "inference")[0]),
                ("lesser", AT_LEAST, 1, lambda r, m=model: model_gain(r, m, "inference")[1]),
                ("its exchanged layers", AT_LEAST, 1, lambda r, m=model: model_gain(r, m, "exchanged")[0]),
                ("lesser", AT_LEAST, 1, lambda r, m=model: model_gain(r, m, "exchanged")[1]),
            ],
        )
        for model, target in (("convnext_tiny", 1.05), ("convformer_s18", 1.15), ("efficientnet_b0", 1.05))
    ),
    (
        "merged models with `engine` against patched ones, inference",
        "engine",
        [
            ("dcls_gauss", AT_MOST, 1.0, lambda r: merged_time(r, "convnext_tiny_dcls_gauss")),
            ("smp", AT_MOST, 1.0, lambda r: merged_time(r, "convnext_tiny_smp")),
        ],
    ),
    (
        "SMP, times as fast as the released formulation",
        "smp",
        [
            ("step of `smpconv_tiny`", AT_LEAST, 5, lambda r: r["results"]["training step"]["ratio"]),
            ("construction, 768 × 13²", AT_LEAST, 1, lambda r: r["results"]["construction 768 x 13²"]["ratio"]),
        ],
    ),
    (
        "`flexnet7`, times as fast as the released formulation",
        "flex_speed",
        [
            (
                "training step",
                AT_LEAST,
                2.4,
                lambda r: r["results"]["flexnet7 training step, sigma 0.125 to 0.125"]["ratio"],
            )
        ],
    ),
    (
        "`resnet50_genv` against `resnet50`",
        "envelope_speed",
        [
            ("training step", AT_MOST, 1.07, lambda r: r["training step"]["resnet50_genv"]["ratio"]),
            ("inference", AT_MOST, 1.05, lambda r: r["inference"]["resnet50_genv"]["ratio"]),
        ],
    ),
    (
        "CC at scale 1/2 against `nn.Conv2d`, the slowest layer",
        "cc_speed",
        [
            ("inference", AT_MOST, 1.05, lambda r: worst_halved(r, "inference")),
            ("training", AT_MOST, 1.15, lambda r: worst_halved(r, "training")),
        ],
    ),
    (
        "CC at scale 0.61, times as fast as building the weights",
        "cc_speed",
        [("inference", AT_LEAST, 11, lambda r: r[CC]["ratio"])],
    ),
]


def figure(results: Results, name: str, bound: str, target: float, of: Callable[[Results], float]) -> str:
    """A figure; bold where it misses its target."""
    try:
        value = of(results)
    except (KeyError, ValueError):
        return f"{name} {UNKNOWN}"
    is_met = value <= target if bound == AT_MOST else value >= target
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"{name} {text if is_met else f'**{text}**'}"


def cell(folder: Path, script: str, figures: list[tuple[str, str, float, Callable[[Results], float]]]) -> str:
    """What a script measured on one machine."""
    path = folder / f"{script.split()[0]}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cells = [figure(results, *each) for each in figures]
    return UNKNOWN if all(cell.endswith(UNKNOWN) for cell in cells) else ", ".join(cells)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folders = sorted(path.parent for path in RESULTS.glob("*/convnext.json"))
    head = ["what", "target", *(f"`{folder.name}`" for folder in folders), "script"]
    rows = [head, ["---"] * len(head)]
    for what, script, figures in ROWS:
        targets = ", ".join(f"{name} {bound} {target:g}" for name, bound, target, _ in figures)
        rows.append([what, targets, *(cell(folder, script, figures) for folder in folders), f"`{script}`"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    print(*lines, sep="\n")
    write_block(PAGE, START, lines)


if __name__ == "__main__":
    main()
