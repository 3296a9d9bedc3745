"""`contconv demo`: train, patch, merge, save and load, on real images."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from .. import hub, patching
from ..inspect import figures
from .digits import Digits, TrainingResult, accuracy, load_digits, train_on_digits
from .lite0 import load_lite0, load_photographs

__all__ = ["run"]

PLAIN, PATCHED = "test_convnext", "test_convnext_dcls_gauss"
BATCH_SIZE = 64


def run(console: Console, output: Path, epochs: int) -> None:
    """Run the demo.

    Args:
        console: where to print.
        output: folder for the saved model and the picture; it exists.
        epochs: passes over the training images, for each model.

    Raises:
        OSError: the folder can't be written, or holds something other than a saved model.
    """
    digits = load_digits()
    console.print(
        f"{len(digits.train_labels)} digits to train on, {len(digits.test_labels)} to test on (scikit-learn),"
        f" 32×32 pixels; {epochs} epochs each"
    )
    models = {name: _create(name) for name in (PLAIN, PATCHED)}
    results = _train(console, models, digits, epochs)
    _print_results(console, results)
    trained = models[PATCHED]
    _patch_pretrained(console)
    merged = patching.merge(trained.eval())
    _print_difference(console, f"{PATCHED}, trained and merged", trained, merged, digits.test_images)
    _save_and_load(console, trained, digits, output / PATCHED)
    picture = figures.kernels(trained).save(output / "kernels.png")
    console.print(f"learned kernels and the positions of their elements: {picture}")


def _create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10)


def _train(console: Console, models: dict[str, nn.Module], digits: Digits, epochs: int) -> dict[str, TrainingResult]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    steps = epochs * (len(digits.train_labels) // BATCH_SIZE)
    results = {}
    with Progress(*columns, console=console) as progress:
        for name, model in models.items():
            task = progress.add_task(name, total=steps)
            advance = functools.partial(progress.advance, task)
            results[name] = train_on_digits(model, digits, epochs, batch_size=BATCH_SIZE, advance=advance)
    return results


def _print_results(console: Console, results: dict[str, TrainingResult]) -> None:
    table = Table("", *results)
    table.add_row("test accuracy", *(f"{result.accuracy:.2%}" for result in results.values()))
    table.add_row("parameters", *(f"{result.parameters:,}" for result in results.values()))
    table.add_row("training time", *(f"{result.seconds:.1f} s" for result in results.values()))
    console.print(table)


@torch.no_grad()
def _patch_pretrained(console: Console) -> None:
    """Patch a pretrained model that is not registered, see what it keeps, and merge it."""
    original, images = load_lite0(), load_photographs(1).flatten(0, 1)
    model = patching.patch(copy.deepcopy(original), "dcls_gauss", progress=False)
    report = patching.report(model)
    labels, expected = model(images).argmax(1), original(images).argmax(1)
    console.print(
        "EfficientNet-Lite0 with its ImageNet weights, patched by hand with dcls_gauss at 23×23:"
        f" {report.parameters_before:,} -> {report.parameters_after:,} parameters;"
        f" {int((labels == expected).sum())} of {len(images)} photographs are classified as before"
    )
    _print_difference(console, "patched by hand and merged", model, patching.merge(model), images[:4])


@torch.no_grad()
def _print_difference(console: Console, what: str, model: nn.Module, merged: nn.Module, images: torch.Tensor) -> None:
    difference = float((model(images) - merged(images)).abs().max())
    console.print(f"{what}: largest difference of the logits {difference:.1e}")


def _save_and_load(console: Console, model: nn.Module, digits: Digits, folder: Path) -> None:
    hub.save_pretrained(model, folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    console.print(
        f"saved to {folder} and loaded with timm.create_model('local-dir:{folder}', pretrained=True):"
        f" test accuracy {accuracy(loaded, digits):.2%}"
    )
