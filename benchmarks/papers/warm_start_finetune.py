"""What a warm start is worth: EfficientNet-Lite0, pretrained on ImageNet, fine-tuned on scikit-learn's digits.

    python -m benchmarks.papers.warm_start_finetune [--seeds N] [--recipes RECIPE ...]

The network gets a new head and is trained for a few epochs: as it is, patched from the fitted kernels, and patched from
random ones. Writes benchmarks/results/warm_start_finetune.json and docs/images/warm_start_finetune.png.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

import timm_contconv as tcc
from benchmarks.common import IMAGES, arguments, new_parser, summary, write_results
from timm_contconv.cli.digits import Digits, accuracy, load_digits, train_on_digits
from timm_contconv.cli.lite0 import load_lite0

RECIPES = ("dcls", "dcls_triangle", "dcls_gauss", "smp", "flex", "genv", "cc")
STARTS = ("unpatched", "fit", "random")
EPOCHS, LEARNING_RATE = 5, 1e-3
SHOWN = (1, 2, 5)
Courses = dict[str, dict[str, list[list[float]]]]


def course(model: nn.Module, digits: Digits, seed: int) -> list[float]:
    """Accuracy after 1, ..., EPOCHS epochs of training."""
    reached: list[float] = []
    batches, steps = len(digits.train_labels) // 64, 0

    def advance() -> None:
        nonlocal steps
        steps += 1
        if steps % batches == 0:
            reached.append(accuracy(model, digits))

    train_on_digits(model, digits, EPOCHS, lr=LEARNING_RATE, seed=seed, advance=advance)
    return reached


def starting_point(base: nn.Module, recipe: str, start: str, seed: int) -> nn.Module:
    """The network with a new head for ten classes, patched as `start` says."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    model.reset_classifier(10)  # type: ignore[operator]
    return model if start == "unpatched" else tcc.patch(model, recipe, init=start, progress=False)


def measure(seeds: int, recipes: Sequence[str]) -> Courses:
    """{recipe: {start: a course per seed}}; what is unpatched stands under its own name."""
    digits, base = load_digits(), load_lite0()
    runs = [("unpatched", "unpatched"), *((recipe, start) for recipe in recipes for start in STARTS[1:])]
    results: Courses = {}
    for seed in track(range(seeds), description="training"):
        for recipe, start in runs:
            found = course(starting_point(base, recipe, start, seed), digits, seed)
            results.setdefault(recipe, {}).setdefault(start, []).append(found)
            print(seed, recipe, start, [f"{value:.3f}" for value in found], flush=True)
    return results


def print_table(results: Courses) -> None:
    print("| recipe | start | " + " | ".join(f"{n} epochs" for n in SHOWN) + " |")
    print("|---" * (2 + len(SHOWN)) + "|")
    for recipe, courses in results.items():
        for start, values in courses.items():
            cells = [summary([100 * value[n - 1] for value in values], 1) for n in SHOWN]
            print(f"| {recipe} | {start} | {' | '.join(cells)} |")


def draw(results: Courses, path: Path) -> None:
    patched = [recipe for recipe in results if recipe != "unpatched"]
    figure = Figure(figsize=(2.2 * len(patched), 2.6), layout="constrained")
    axes = figure.subplots(1, len(patched), sharey=True, squeeze=False)[0]
    for axis, recipe in zip(axes, patched, strict=True):
        shown = {**results[recipe], **results["unpatched"]}
        for start, colour in zip(STARTS, ("grey", "tab:blue", "tab:orange"), strict=True):
            values = 100 * torch.tensor(shown[start])
            epochs = range(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), color=colour, label=start)
            axis.fill_between(epochs, values.amin(0), values.amax(0), color=colour, alpha=0.2)
        axis.set(title=recipe, xlabel="epochs", ylim=(0, 101))
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = new_parser(__doc__, "warm_start_finetune.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=RECIPES, choices=RECIPES)
    parser.add_argument("--picture", type=Path, default=IMAGES / "warm_start_finetune.png")
    options = arguments(parser)
    results = measure(options.seeds, options.recipes)
    write_results(options.output, results)
    print_table(results)
    draw(results, options.picture)


if __name__ == "__main__":
    main()
