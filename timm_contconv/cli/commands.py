"""What the commands of `contconv` do. Their arguments are explained in `contconv/app.py`."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import typer
from rich.table import Table
from safetensors import SafetensorError
from timm.models import get_model_input_config
from torch import nn

from contconv.output import console, errors

from .. import patching
from ..hub import save_pretrained
from ..hub.checks import BUILD_ERRORS
from ..hub.exchange import made_folder
from ..hub.names import PATCHED
from ..hub.save import replaceable
from ..hub.skeleton import without_memory
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
from .environment import environment
from .images import load_images
from .run import run_script

__all__ = ["demo", "env", "export", "inspect", "list_models", "merge", "patch", "publish", "run", "show", "tune"]

#: how timm's names of saved models start
SAVED = ("local-dir:", "hf-hub:", "hf_hub:")

#: images that refit layers, and that a report runs once per layer
REFIT_IMAGES, REPORT_IMAGES = 64, 16


@contextmanager
def _refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Print these errors in a sentence, and end with code 2."""
    try:
        yield
    except kinds as error:
        errors.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(code=2) from None


def list_models() -> None:
    table = Table("recipe", "description", "registered models")
    for recipe in patching.list_patches():
        registered = [name for name, architecture in PATCHED.items() if architecture.recipe == recipe]
        table.add_row(recipe, patching.load_patch(recipe).description, "\n".join(registered))
    console.print(table)


@_refusing(ValueError, OSError)
def show(name: str) -> None:
    if name in PATCHED:
        with without_memory():
            console.print(patching.report(timm.create_model(name)))
    else:
        console.print(_recipe(name).to_toml(), highlight=False, markup=False, soft_wrap=True)


@_refusing(ValueError, OSError)
def patch(
    model: str,
    recipe: str,
    *,
    init: Init,
    pretrained: bool,
    images: Path | None,
    save: Path | None,
    dry_run: bool,
    input_size: tuple[int, int, int] | None,
    as_json: bool,
    **choice: Any,  # of layers and of their settings, as for `tcc.patch`
) -> None:
    if dry_run and save is not None:
        raise ValueError(f"--save {save}: expected no --save with --dry-run, which saves nothing; omit one of them")
    if save is not None:
        with _writing("--save", save):
            replaceable(save)  # before minutes are spent on a fit
    if choice["kernel_count"] is None:  # not every method has this setting
        del choice["kernel_count"]
    result: PatchPlan | PatchReport
    if dry_run:
        with without_memory():
            result = patching.plan_patch(_create(model, pretrained=False), recipe, **choice)
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
    if as_json:
        console.out(json.dumps(result.to_dict(), indent=2), highlight=False)
    else:
        console.print(result)


@_refusing(ValueError, ImportError)
def inspect(model: str, *, images: Path | None, start: str | None, pretrained: bool, output: Path, show: bool) -> None:
    with _writing("--output", output):
        check_writable(output)
    before = None if start is None else _created_or_loaded(start, pretrained)
    found = inspect_model(_created_or_loaded(model, pretrained), images, start=before)
    with _writing("--output", output):
        found.save(output)
    for text in found.left_out.values():
        console.print(text, highlight=False, markup=False)
    console.print(f"{output}: {output.stat().st_size / 1e6:.1f} MB", highlight=False, markup=False)
    if show:
        typer.launch(str(output.resolve()))


@_refusing(ValueError)
def demo(*, output: Path, epochs: int) -> None:
    with _writing("--output", output), made_folder(output):
        demo_command.run(console, output, epochs)


@_refusing(ValueError)
def tune(
    model: str, *, batch_size: int, input_size: tuple[int, int, int] | None, amp: bool, channels_last: bool, train: bool
) -> None:
    network = _create(model, pretrained=False)
    _check_input_size(input_size, model, network)
    size = input_size or get_model_input_config(network)["input_size"]
    if not any(isinstance(module, ConvReplacement) for module in network.modules()):
        console.print(f"{model}: patched with the recipe 'engine', because it has no layer of this package")
        patching.patch(network, "engine")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(batch_size, *size, device=device).to(memory_format=layout)
    step = tune_command.step_of(network.to(device).to(memory_format=layout), images, amp, train)
    kind = "training step" if train else "inference"
    with _taking(input_size):
        step()
    console.print(tune_command.tune(step, console, f"{model}: {kind}, batch of {batch_size}"))


@_refusing(ValueError)
def run(
    script: Path, arguments: Sequence[str], position_lr_scale: str | None, penalty: float, penalty_power: int
) -> int | str | None:
    scale = _position_scale(position_lr_scale)
    if not math.isfinite(penalty):
        raise ValueError(f"--penalty={penalty}: expected a finite number")
    if penalty_power != 1 and not penalty:
        raise ValueError(f"--penalty-power={penalty_power}: expected --penalty too; the power is unused without it")
    with training_hooks(scale, penalty, penalty_power):
        return run_script(script, arguments)


@_refusing(ValueError, OSError)
def publish(folder: Path, **options: Any) -> None:
    publish_command.run(console, folder, **options)


@_refusing(ValueError, OSError)
def merge(model: str, output: Path) -> None:
    name = f"{SAVED[0]}{model}" if Path(model).is_dir() else model
    if not name.startswith(SAVED):
        raise ValueError(f"MODEL={model!r}: expected a folder, or {SAVED[0]}FOLDER or hf-hub:USER/NAME")
    merged = patching.merge(_create(name, pretrained=True))
    with _writing("--output", output):
        save_pretrained(merged, output)
    console.print(f"{output}: {sum(p.numel() for p in merged.parameters()):,} parameters", soft_wrap=True)


@_refusing(ValueError, OSError, ModuleNotFoundError)
def export(model: str, output: Path, *, dynamic: list[str] | None, pretrained: bool, **options: Any) -> None:
    loaded = _create(model, pretrained or model.startswith(SAVED))
    export_command.run(console, loaded, output, dynamic=("batch",) if dynamic is None else dynamic, **options)


def env() -> None:
    for name, value in environment():
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)


def _position_scale(text: str | None) -> PositionScale | None:
    """The scale that --position-lr-scale names."""
    if text is None or text == "paper":
        return None if text is None else {}
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise ValueError(f"--position-lr-scale={text}: expected 'paper' or a finite number of more than 0")
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
        raise ValueError(f"{option} {folder}: {reason}") from None
