"""What a warm start is worth: test accuracy on scikit-learn's digits right after patching, and some epochs later.

    python -m benchmarks.papers.warm_start [--seeds N]

`test_convnext` and `test_resnet` are trained to 98 % or better, patched with each method, and trained on: once from
the fitted kernels, once from random ones. Writes benchmarks/results/warm_start.json and docs/images/warm_start.png.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import nn

import timm_contconv as tcc
from benchmarks.common import IMAGES, arguments, new_parser, summary, write_results
from timm_contconv.cli.digits import Digits, accuracy, load_digits, train_on_digits

RECIPES = {"test_convnext": ("dcls", "dcls_triangle", "dcls_gauss", "smp", "flex"), "test_resnet": ("genv", "cc")}
BASE_EPOCHS = 30
BASE_LEARNING_RATE = {"test_convnext": 4e-3, "test_resnet": 2e-3}
EPOCHS, LEARNING_RATE = 5, 1e-3
SHOWN = (0, 1, 2, 5)
Courses = dict[str, dict[str, list[list[float]]]]


def course(model: nn.Module, digits: Digits, seed: int) -> list[float]:
    """Accuracy after 0, 1, ..., EPOCHS epochs of training."""
    reached = [accuracy(model, digits)]
    batches, steps = len(digits.train_labels) // 64, 0

    def advance() -> None:
        nonlocal steps
        steps += 1
        if steps % batches == 0:
            reached.append(accuracy(model, digits))

    train_on_digits(model, digits, EPOCHS, lr=LEARNING_RATE, seed=seed, advance=advance)
    return reached


def trained_base(name: str, digits: Digits, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10)
    train_on_digits(model, digits, BASE_EPOCHS, lr=BASE_LEARNING_RATE[name], seed=seed)
    return model


def measure(seeds: int) -> Courses:
    """{recipe: {"base": [[accuracy]], "fit" and "random": a course per seed}}."""
    digits = load_digits()
    results: Courses = {}
    with Progress() as progress:
        task = progress.add_task("training", total=seeds * sum(1 + 2 * len(recipes) for recipes in RECIPES.values()))
        for name, recipes in RECIPES.items():
            for seed in range(seeds):
                base = trained_base(name, digits, seed)
                progress.advance(task)
                for recipe in recipes:
                    courses = results.setdefault(recipe, {"base": [], "fit": [], "random": []})
                    courses["base"].append([accuracy(base, digits)])
                    for init in ("fit", "random"):
                        torch.manual_seed(seed)
                        patched = tcc.patch(copy.deepcopy(base), recipe, init=init, progress=False)
                        courses[init].append(course(patched, digits, seed))
                        progress.advance(task)
    return results


def print_table(results: Courses) -> None:
    print("| model | recipe | before | start | " + " | ".join(f"{n} epochs" for n in SHOWN) + " |")
    print("|---" * (4 + len(SHOWN)) + "|")
    for name, recipes in RECIPES.items():
        for recipe in recipes:
            before = summary([100 * values[0] for values in results[recipe]["base"]], 1)
            for init in ("fit", "random"):
                cells = [summary([100 * values[n] for values in results[recipe][init]], 1) for n in SHOWN]
                print(f"| {name} | {recipe} | {before} | {init} | {' | '.join(cells)} |")


def draw(results: Courses, path: Path) -> None:
    figure = Figure(figsize=(2.2 * len(results), 2.6), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True)
    for axis, (recipe, courses) in zip(axes, results.items(), strict=True):
        for init, colour in (("fit", "tab:blue"), ("random", "tab:orange")):
            values = 100 * torch.tensor(courses[init])
            axis.plot(values.mean(0), color=colour, label=f"init={init!r}")
            axis.fill_between(range(values.shape[1]), values.amin(0), values.amax(0), color=colour, alpha=0.2)
        base = 100 * statistics.mean(values[0] for values in courses["base"])
        axis.axhline(base, color="grey", linestyle=":", label="before the patch")
        axis.set(title=recipe, xlabel="epochs", ylim=(0, 101))
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = new_parser(__doc__, "warm_start.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path, default=IMAGES / "warm_start.png")
    options = arguments(parser)
    results = measure(options.seeds)
    write_results(options.output, results)
    print_table(results)
    draw(results, options.picture)


if __name__ == "__main__":
    main()
