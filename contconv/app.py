"""The commands of `contconv`: what they take. Each imports what it needs, so that the rest starts without timm."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from timm_contconv.patching import PatchPlan, PatchReport, PatchSpec

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Continuous convolutions for timm.")
#: a file or a pipe has no width: 140 columns there
console = Console(width=None if sys.stdout.isatty() else 140)


def _print_version(wanted: bool) -> None:
    import importlib.metadata

    if wanted:
        console.print(f"timm_contconv {importlib.metadata.version('timm_contconv')}", highlight=False)
        raise typer.Exit


@app.callback()
def prepare(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_models() -> None:
    """List the recipes and their registered models."""
    from timm_contconv import patching
    from timm_contconv.hub.names import PATCHED

    table = Table("recipe", "description", "registered models")
    for name in patching.list_patches():
        registered = [architecture.name for architecture in PATCHED.values() if architecture.recipe == name]
        table.add_row(name, patching.load_patch(name).description, "\n".join(registered))
    console.print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A recipe, or a registered model.")]) -> None:
    """Show a recipe, or what the patch of a registered model changes."""
    import timm
    import torch

    from timm_contconv import patching
    from timm_contconv.hub.names import PATCHED

    if name in PATCHED:
        with torch.device("meta"):
            console.print(patching.report(timm.create_model(name)))
        return
    try:
        console.print(_recipe(name).to_toml(), highlight=False, markup=False)
    except (ValueError, OSError) as error:
        raise _refused(error) from None


@app.command()
def patch(
    model: Annotated[str, typer.Argument(help="A timm model.")],
    recipe: Annotated[str, typer.Argument(help="A recipe, or the path of a .toml.")],
    select: Annotated[
        list[str] | None, typer.Option(help="Convolutions to replace, instead of the recipe's choice.")
    ] = None,
    min_kernel_size: Annotated[int | None, typer.Option(min=1, help="Leave out kernels smaller than this.")] = None,
    init: Annotated[
        Literal["fit", "random"],
        typer.Option(help="'fit' starts from the replaced kernels, 'random' from random ones."),
    ] = "fit",
    pretrained: Annotated[bool, typer.Option(help="Start from timm's pretrained weights.")] = False,
    save: Annotated[Path | None, typer.Option(help="Folder to save the patched model to; timm loads it.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only print the plan; make and save no weights.")] = False,
    input_size: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Channels, height and width for counting multiply-adds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Patch a timm model, print the changes, and save it with --save."""
    import torch

    from timm_contconv import patching
    from timm_contconv.hub import save_pretrained

    if dry_run and save is not None:
        raise _refused(
            ValueError(f"--save {save}: expected no --save with --dry-run, which saves nothing; omit one of them")
        )
    choice: dict[str, Any] = {"select": select, "min_kernel_size": min_kernel_size}
    try:
        if dry_run:
            with torch.device("meta"):
                result: PatchPlan | PatchReport = patching.plan_patch(
                    _create(model, pretrained=False), recipe, **choice
                )
        else:
            patched = _create(model, pretrained)
            _check_input_size(input_size, model, patched)
            result = _report(patching.patch(patched, recipe, init=init, **choice), input_size)
            if save is not None:
                with _writing("--save", save):
                    save_pretrained(patched, save)
    except (ValueError, OSError) as error:
        raise _refused(error) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        console.print(result)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the saved model and the picture.")] = Path("demo_output"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images, for each model.")] = 20,
) -> None:
    """Train a plain and a DCLS model on real digits; patch, merge, save, load; draw learned kernels."""
    from timm_contconv.cli import demo as command

    with _writing("--output", output):
        command.run(console, output, epochs)


@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def run(
    context: typer.Context,
    script: Annotated[
        Path,
        typer.Argument(
            metavar="SCRIPT", exists=True, dir_okay=False, help="For example timm's train.py; its arguments follow."
        ),
    ],
    position_lr_scale: Annotated[
        float | None,
        typer.Option(help="Learning rate of positions, widths, radii and masks, relative to the weights' (DCLS: 5)."),
    ] = None,
    penalty: Annotated[
        float, typer.Option(metavar="FACTOR", min=0, help="Add FACTOR * tcc.penalty(model) to the script's loss.")
    ] = 0.0,
    penalty_power: Annotated[
        int, typer.Option(min=1, help="Raise the penalty to this power first (released DCLS code: 2).")
    ] = 1,
) -> None:
    """Run a script with the plugin imported and the methods' constraints after each optimiser step.

    Options come before SCRIPT. Everything after SCRIPT goes to the script.
    """
    from timm_contconv.cli.run import run_script
    from timm_contconv.train import training_hooks

    if position_lr_scale is not None and not 0 < position_lr_scale < math.inf:
        raise _refused(ValueError(f"--position-lr-scale={position_lr_scale}: expected more than 0, and finite"))
    if not math.isfinite(penalty):
        raise _refused(ValueError(f"--penalty={penalty}: expected a finite number"))
    if penalty_power != 1 and not penalty:
        raise _refused(
            ValueError(f"--penalty-power={penalty_power}: expected --penalty too; the power is unused without it")
        )
    with training_hooks(position_lr_scale, penalty, penalty_power):
        status = run_script(script, context.args)
    sys.exit(status)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A folder of hub/, such as hub/convnext_tiny_dcls.zenodo_in1k.")],
    file: Annotated[Path | None, typer.Option(help="A file with the weights. Default: download them.")] = None,
    repo_id: Annotated[
        str | None, typer.Option(help="The repository. Default: USER/ARCHITECTURE.TAG of yours.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Propose the commit as a pull request.")] = False,
) -> None:
    """Load a weight of hub/, convert it, verify it, and publish it on the Hugging Face Hub.

    The token comes from `hf auth login` or HF_TOKEN.
    """
    from timm_contconv.cli import publish as command

    try:
        command.run(
            console, folder, file=file, repo_id=repo_id, private=private, revision=revision, create_pr=create_pr
        )
    except (ValueError, OSError) as error:
        raise _refused(error) from None


@app.command()
def env() -> None:
    """Print versions, machine, compiler and measured choices, to paste into a bug report."""
    from timm_contconv.cli.environment import environment

    for name, value in environment():
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)


def _recipe(name: str) -> PatchSpec:
    from timm_contconv import patching
    from timm_contconv.hub.names import PATCHED

    recipes = patching.list_patches()
    if name in recipes or name.endswith(".toml"):
        return patching.load_patch(name)
    near = difflib.get_close_matches(name, [*recipes, *PATCHED])
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"NAME={name!r}: no such recipe or registered model; {hint}contconv list lists all; a path must end in .toml"
    )


def _create(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"MODEL={name!r}: timm has no such model; timm.list_models() lists all")
    try:
        return timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:  # unknown tag, or no weights
        raise ValueError(f"MODEL={name!r}: {error}") from None


def _check_input_size(size: tuple[int, int, int] | None, name: str, model: nn.Module) -> None:
    from timm.models import get_model_input_config

    if size is None:
        return
    channels = get_model_input_config(model)["input_size"][0]
    if size[0] != channels or min(size) < 1:
        raise ValueError(
            f"{_option(size)}: expected {channels} channels, as {name} takes, and a height and a width of at least 1"
        )


def _report(model: nn.Module, size: tuple[int, int, int] | None) -> PatchReport:
    from timm_contconv import patching

    try:
        return patching.report(model, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        if size is None:
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{_option(size)}: the model can't take it: {reason}; try another size") from None


def _option(input_size: tuple[int, int, int]) -> str:
    return f"--input-size {' '.join(map(str, input_size))}"


@contextmanager
def _writing(option: str, folder: Path) -> Iterator[None]:
    """Report errors in writing to a folder as errors of the option that named it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None)
        text = str(error).removeprefix(f"folder={str(folder)!r}: ")
        reason = f"can't be written: {cause}; choose another" if cause else text
        raise _refused(ValueError(f"{option} {folder}: {reason}")) from None


def _refused(error: Exception) -> typer.Exit:
    console.print(str(error), style="red", highlight=False, markup=False)
    return typer.Exit(code=2)
