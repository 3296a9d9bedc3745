"""The commands of `contconv`: what they take. What they do is imported when one runs, so that the rest starts fast."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .output import console, open_closed_streams, respell

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Continuous convolutions for timm.")


def main() -> None:
    """The program `contconv`."""
    open_closed_streams()
    try:
        app()
    except OSError as error:  # commands explain theirs; --help may not be printable
        sys.exit(f"contconv: {error}")


def _print_version(wanted: bool) -> None:
    import importlib.metadata

    if wanted:
        console.print(f"timm_contconv {importlib.metadata.version('timm_contconv')}", highlight=False)
        raise typer.Exit


@app.callback()
def prepare(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "run":  # scripts print as they do under python
        respell()


def command(declaration: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a declaration. The function of its name in `timm_contconv.cli.commands` does it."""

    @functools.wraps(declaration)
    def do(**arguments: Any) -> None:
        from timm_contconv.cli import commands

        getattr(commands, declaration.__name__)(**arguments)

    return app.command()(do)


@app.command("list")
def list_models() -> None:
    """List the recipes and their registered models."""
    from timm_contconv.cli import commands

    commands.list_models()


@command
def show(name: Annotated[str, typer.Argument(help="A recipe, or a registered model.")]) -> None:
    """Show a recipe, or what the patch of a registered model changes."""


@command
def patch(
    model: Annotated[str, typer.Argument(help="A timm model, or a saved one as local-dir:FOLDER or hf-hub:USER/NAME.")],
    recipe: Annotated[str, typer.Argument(help="A recipe, or the path of a .toml.")],
    select: Annotated[
        list[str] | None, typer.Option(help="Convolutions to replace, instead of the recipe's choice.")
    ] = None,
    min_kernel_size: Annotated[int | None, typer.Option(min=1, help="Leave out kernels smaller than this.")] = None,
    init: Annotated[
        Literal["fit", "random"],
        typer.Option(help="'fit' starts from the replaced kernels, 'random' from random ones."),
    ] = "fit",
    pretrained: Annotated[
        bool, typer.Option(help="Start from timm's pretrained weights, or from the saved ones.")
    ] = False,
    kernel_count: Annotated[
        int | None, typer.Option(min=1, help="Elements per kernel, instead of as many as the fit needs.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Up to 64 of its images refit the new layers, and show what each does to the outputs.",
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Folder to save the patched model to; timm loads it.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only print the plan; make and save no weights.")] = False,
    input_size: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Channels, height and width for counting multiply-adds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Patch a timm model, print the changes, and save it with --save."""


@command
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_FOLDER", help="A timm model, or a saved model's folder.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images. Default: photographs of scikit-image.")] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="MODEL_OR_FOLDER", help="The model before its patch or training, to compare with."),
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Load released weights of models that are given by name.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .html file to write.")] = Path("report.html"),
    show: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> None:
    """Write a report of what a model's kernels learned: one HTML file with tables and figures."""


@command
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the saved model and the page.")] = Path("demo_output"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the digits, for each model.")] = 2,
) -> None:
    """Patch a pretrained model with every method and compare; fine-tune, merge, save, load; look inside."""


@command
def tune(
    model: Annotated[str, typer.Argument(help="A timm model.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    input_size: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Channels, height and width. Default: the model's own.")
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Run in bfloat16 with autocast.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Images in channels-last layout.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Measure training steps, not only inference.")] = False,
) -> None:
    """Measure a model's convolutions on this machine, and print what was chosen and what that gains.

    The results are remembered: later processes with as many threads start with them. A model without layers of this
    package is patched with the recipe `engine` first. Runs on CUDA where there is one.
    """


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
        str | None,
        typer.Option(
            metavar="SCALE",
            help="Learning rate of positions, widths, radii and masks, relative to the weights': a number, or 'paper'"
            " for what each method's paper has (DCLS 5, SMP's radii 0.1, FlexConv's masks 0.1).",
        ),
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
    from timm_contconv.cli import commands

    sys.exit(commands.run(script, context.args, position_lr_scale, penalty, penalty_power))


@command
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


@command
def merge(
    model: Annotated[str, typer.Argument(help="A saved model: local-dir:FOLDER, hf-hub:USER/NAME, or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model; timm loads it.")],
) -> None:
    """Turn a saved model's layers into plain convolutions, and save that model."""


@command
def export(
    model: Annotated[str, typer.Argument(help="A timm model, or local-dir:FOLDER, or hf-hub:USER/NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, .onnx or .pt2.")],
    format: Annotated[
        Literal["onnx", "torch", "aoti"],
        typer.Option(help="'onnx', 'torch' (torch.export) or 'aoti' (compiled for this machine)."),
    ] = "onnx",
    dynamic: Annotated[
        list[str] | None, typer.Option(help="A size that stays open: batch, height or width; may be repeated.")
    ] = None,
    merge: Annotated[bool, typer.Option(help="Write plain convolutions, not the construction of kernels.")] = True,
    pretrained: Annotated[bool, typer.Option(help="Load timm's pretrained weights.")] = False,
    input_size: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Channels, height and width of an image.")
    ] = None,
) -> None:
    """Write a model to a file that runs without this package, and compare it with the model."""


@command
def env() -> None:
    """Print versions, machine, compiler and measured choices, to paste into a bug report."""
