"""The commands of `contconv`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import patching
from ..models.patched import PATCHED
from . import demo as demo_command

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Continuous convolutions for timm.")
#: what is not a terminal (a file, a pipe) has no width of its own
console = Console(width=None if sys.stdout.isatty() else 140)


@app.command("list")
def list_models() -> None:
    """List the recipes and the models that they are registered on."""
    table = Table("recipe", "what it does", "registered models")
    for name in patching.list_patches():
        registered = [architecture.name for architecture in PATCHED.values() if architecture.recipe == name]
        table.add_row(name, patching.load_patch(name).description, "\n".join(registered))
    console.print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A recipe, or a registered model.")]) -> None:
    """Show a recipe, or what the patch of a registered model changes."""
    if name in PATCHED:
        with torch.device("meta"):
            console.print(patching.report(timm.create_model(name)))
        return
    try:
        console.print(patching.load_patch(name).to_toml(), highlight=False, markup=False)
    except (ValueError, FileNotFoundError) as error:
        raise _refused(error) from None


@app.command()
def patch(
    model: Annotated[str, typer.Argument(help="A timm model.")],
    recipe: Annotated[str, typer.Argument(help="A recipe, or the path of a .toml.")],
    select: Annotated[list[str] | None, typer.Option(help="What to replace instead of the recipe's choice.")] = None,
) -> None:
    """Patch a timm model and print what changes."""
    if not timm.is_model(model):
        raise _refused(ValueError(f"MODEL={model!r}: timm has no such model; timm.list_models() lists all"))
    try:
        with torch.device("meta"):
            patched = patching.patch(timm.create_model(model), recipe, select=select)
    except (ValueError, FileNotFoundError) as error:
        raise _refused(error) from None
    console.print(patching.report(patched))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the saved model and the picture.")] = Path("demo_output"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images, for each model.")] = 20,
) -> None:
    """Train a plain and a DCLS model on real digits; patch, merge, save, load; draw learned kernels."""
    demo_command.run(console, output, epochs)


def _refused(error: Exception) -> typer.Exit:
    console.print(str(error), style="red", highlight=False, markup=False)
    return typer.Exit(code=2)
