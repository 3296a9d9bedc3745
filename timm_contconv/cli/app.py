"""The commands of `contconv`."""

from __future__ import annotations

import copy
import difflib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.table import Table
from safetensors import SafetensorError
from timm.models._input import get_model_input_config
from torch import nn

from .. import patching
from ..export import Format
from ..hub import save_pretrained
from ..hub.checks import BUILD_ERRORS
from ..hub.exchange import made_folder
from ..hub.names import PATCHED
from ..hub.save import replaceable
from ..inspect import inspect as inspect_model
from ..inspect.writing import check_writable
from ..layers import ConvReplacement
from ..layers.core.replacement import Init
from ..patching import PatchPlan, PatchReport, PatchSpec
from ..train import training_hooks
from ..train.groups import PositionScale
from . import demo as demo_command
from . import export as export_command
from . import publish as publish_command
from . import tune as tune_command
from .images import load_images
from .output import console, errors, open_closed_streams, respell
from .run import run_script

__all__ = ["app", "main"]

#: how timm's names of saved models start
SAVED = ("local-dir:", "hf-hub:", "hf_hub:")

#: images that refit layers, and that a report runs once per layer
REFIT_IMAGES, REPORT_IMAGES = 64, 16

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Continuous convolutions for timm.")


def main() -> None:
    """The program `contconv`."""
    open_closed_streams()
    try:
        app()
    except OSError as error:  # commands explain theirs; --help may not be printable
        sys.exit(f"contconv: {error}")


@app.callback()
def prepare(context: typer.Context) -> None:
    if context.invoked_subcommand != "run":  # scripts print as they do under python
        respell()


@app.command("list")
def list_models() -> None:
    """List the recipes and their registered models."""
    table = Table("recipe", "description", "registered models")
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
        recipe = _recipe(name)
    except (ValueError, OSError) as error:
        raise _refused(error) from None
    console.print(recipe.to_toml(), highlight=False, markup=False, soft_wrap=True)


@app.command()
def patch(
    model: Annotated[str, typer.Argument(help="A timm model, or a saved one as local-dir:FOLDER or hf-hub:USER/NAME.")],
    recipe: Annotated[str, typer.Argument(help="A recipe, or the path of a .toml.")],
    select: Annotated[
        list[str] | None, typer.Option(help="Convolutions to replace, instead of the recipe's choice.")
    ] = None,
    min_kernel_size: Annotated[int | None, typer.Option(min=1, help="Leave out kernels smaller than this.")] = None,
    init: Annotated[
        Init, typer.Option(help="'fit' starts from the replaced kernels, 'random' from random ones.")
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
    if dry_run and save is not None:
        raise _refused(
            ValueError(f"--save {save}: expected no --save with --dry-run, which saves nothing; omit one of them")
        )
    if save is not None:
        with _writing("--save", save):
            replaceable(save)  # before minutes are spent on a fit
    choice: dict[str, Any] = {"select": select, "min_kernel_size": min_kernel_size}
    if kernel_count is not None:
        choice["kernel_count"] = kernel_count
    try:
        if dry_run:
            with torch.device("meta"):
                result: PatchPlan | PatchReport = patching.plan_patch(
                    _create(model, pretrained=False), recipe, **choice
                )
        else:
            patched = _create(model, pretrained)
            _check_input_size(input_size, model, patched)
            if images is None:
                result = _report(patching.patch(patched, recipe, init=init, **choice), input_size)
            else:
                result = _patch_with_images(patched, recipe, images, input_size, init=init, **choice)
            if save is not None:
                with _writing("--save", save):
                    save_pretrained(patched, save)
    except (ValueError, OSError) as error:
        raise _refused(error) from None
    if as_json:
        console.out(json.dumps(result.to_dict(), indent=2), highlight=False)
    else:
        console.print(result)


@app.command()
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
    try:
        with _writing("--output", output):
            check_writable(output)
        before = None if start is None else _created_or_loaded(start, pretrained)
        found = inspect_model(_created_or_loaded(model, pretrained), images, start=before)
        with _writing("--output", output):
            found.save(output)
    except (ValueError, ImportError) as error:
        raise _refused(error) from None
    for text in found.left_out.values():
        console.print(text, highlight=False, markup=False)
    console.print(f"{output}: {output.stat().st_size / 1e6:.1f} MB", highlight=False, markup=False)
    if show:
        typer.launch(str(output.resolve()))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the saved model and the picture.")] = Path("demo_output"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images, for each model.")] = 20,
) -> None:
    """Train a plain and a DCLS model on real digits; patch, merge, save, load; draw learned kernels."""
    with _writing("--output", output), made_folder(output):
        demo_command.run(console, output, epochs)


@app.command()
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
    try:
        network = _create(model, pretrained=False)
        _check_input_size(input_size, model, network)
        size = input_size or get_model_input_config(network)["input_size"]
        if not any(isinstance(module, ConvReplacement) for module in network.modules()):
            console.print(f"{model}: patched with the recipe 'engine', because it has no layer of this package")
            patching.patch(network, "engine")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        device = "cuda" if torch.cuda.is_available() else "cpu"
        images = torch.randn(batch_size, *size, device=device).to(memory_format=layout)
        step = tune_command.step_of(network.to(device, memory_format=layout), images, amp, train)
        kind = "training step" if train else "inference"
        with _taking(input_size):
            step()
        console.print(tune_command.tune(step, console, f"{model}: {kind}, batch of {batch_size}"))
    except ValueError as error:
        raise _refused(error) from None


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
    scale = _position_scale(position_lr_scale)
    if not math.isfinite(penalty):
        raise _refused(ValueError(f"--penalty={penalty}: expected a finite number"))
    if penalty_power != 1 and not penalty:
        raise _refused(
            ValueError(f"--penalty-power={penalty_power}: expected --penalty too; the power is unused without it")
        )
    with training_hooks(scale, penalty, penalty_power):
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
    try:
        publish_command.run(
            console, folder, file=file, repo_id=repo_id, private=private, revision=revision, create_pr=create_pr
        )
    except (ValueError, OSError) as error:
        raise _refused(error) from None


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="A saved model: local-dir:FOLDER, hf-hub:USER/NAME, or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model; timm loads it.")],
) -> None:
    """Turn a saved model's layers into plain convolutions, and save that model."""
    try:
        name = f"{SAVED[0]}{model}" if Path(model).is_dir() else model
        if not name.startswith(SAVED):
            raise ValueError(f"MODEL={model!r}: expected a folder, or {SAVED[0]}FOLDER or hf-hub:USER/NAME")
        merged = patching.merge(_create(name, pretrained=True))
        with _writing("--output", output):
            save_pretrained(merged, output)
    except (ValueError, OSError) as error:
        raise _refused(error) from None
    console.print(f"{output}: {sum(p.numel() for p in merged.parameters()):,} parameters", soft_wrap=True)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A timm model, or local-dir:FOLDER, or hf-hub:USER/NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, .onnx or .pt2.")],
    format: Annotated[
        Format, typer.Option(help="'onnx', 'torch' (torch.export) or 'aoti' (compiled for this machine).")
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
    try:
        loaded = _create(model, pretrained or model.startswith(SAVED))
        sizes = ("batch",) if dynamic is None else tuple(dynamic)
        export_command.run(console, loaded, output, format, sizes, merge, input_size)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise _refused(error) from None


def _position_scale(text: str | None) -> PositionScale | None:
    """The scale that --position-lr-scale names."""
    if text is None or text == "paper":
        return None if text is None else {}
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise _refused(ValueError(f"--position-lr-scale={text}: expected 'paper' or a finite number of more than 0"))
    return scale


def _patch_with_images(
    model: nn.Module, recipe: str, folder: Path, input_size: tuple[int, int, int] | None, **choice: Any
) -> PatchReport:
    """Patch a model, refit what can be refit, and report what the patch does to the outputs."""
    found = load_images(folder, model, REFIT_IMAGES)
    original = copy.deepcopy(model)
    patching.patch(model, recipe, **choice)
    if patching.can_refit(model):
        patching.refit_(model, original, found)
    return patching.report(model, input_size, original=original, images=found[:REPORT_IMAGES])


def _recipe(name: str) -> PatchSpec:
    recipes = patching.list_patches()
    if name in recipes or name.endswith(".toml"):
        return patching.load_patch(name)
    near = difflib.get_close_matches(name, [*recipes, *PATCHED])
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"NAME={name!r}: no such recipe or registered model; {hint}contconv list lists all; a path must end in .toml"
    )


def _create(name: str, pretrained: bool) -> nn.Module:
    is_saved = name.startswith(SAVED)
    if not is_saved and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models())
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        folder = f"a saved model is {SAVED[0]}{name}; " if Path(name).is_dir() else ""
        if name in patching.list_patches():
            hint = "it is a recipe: the model comes first; "
        raise ValueError(f"MODEL={name!r}: timm has no such model; {hint}{folder}timm.list_models() lists all")
    try:
        return timm.create_model(name, pretrained=pretrained)
    except (ValueError, OSError, *BUILD_ERRORS) as error:  # unknown tag, no weights, no such folder or repository
        raise ValueError(f"MODEL={name!r}: {error}") from None


def _created_or_loaded(name: str, pretrained: bool) -> nn.Module:
    """A model by its name, or from the folder where it was saved."""
    if not timm.is_model(name) and Path(name).is_dir():
        try:
            return timm.create_model(f"local-dir:{name}", pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: no model can be loaded from this folder: {error}") from None
    return _create(name, pretrained)


def _check_input_size(size: tuple[int, int, int] | None, name: str, model: nn.Module) -> None:
    if size is None:
        return
    channels = get_model_input_config(model)["input_size"][0]
    if size[0] != channels or min(size) < 1:
        raise ValueError(
            f"{_option(size)}: expected {channels} channels, as {name} takes, and a height and a width of at least 1"
        )


def _report(model: nn.Module, size: tuple[int, int, int] | None) -> PatchReport:
    try:
        return patching.report(model, size)
    except ValueError as error:
        raise ValueError(str(error).replace(f"input_size={size}", "" if size is None else _option(size))) from None


@contextmanager
def _taking(size: tuple[int, int, int] | None) -> Iterator[None]:
    """Report errors of a model that runs at --input-size as errors of that option."""
    try:
        yield
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
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        cause = getattr(error, "strerror", None)
        text = str(error).removeprefix(f"folder={str(folder)!r}: ")
        reason = f"can't be written: {cause}; choose another" if cause else text
        raise _refused(ValueError(f"{option} {folder}: {reason}")) from None


def _refused(error: Exception) -> typer.Exit:
    errors.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(code=2)
