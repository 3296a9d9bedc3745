"""Save a model to a folder that timm loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from ..layers import ConvReplacement
from ..layers.core.arguments import check_module
from ..patching.record import MERGED, MergedRecord, PatchRecord, get_record, require_record
from .build import check_folder
from .card import CARD, PICTURE, write_card
from .checks import CONFIG, RESERVED, WEIGHTS, check_path
from .exchange import replaced, restore
from .merged import describe_merged
from .names import HAND_PATCHED, PATCHED

__all__ = ["replaceable", "save_pretrained", "write_folder"]

#: everything that may be in the folder of a saved model
FILES = frozenset((CONFIG, WEIGHTS, CARD, PICTURE))


def save_pretrained(model: nn.Module, folder: str | Path) -> Path:
    """Write a patched or a merged timm model to a folder: weights, configuration, model card.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` and `from_pretrained` load it. A model of a named
    architecture is saved under its name; one patched by hand under "contconv", which rebuilds it from its base and its
    patch; a merged one under "contconv", too, with a list of its convolutions. The folder appears when it is whole; a
    saved model that is there is replaced by the new one. A process that is killed while it saves leaves the old model
    under the folder's name, or beside it, where the next `from_pretrained` or `save_pretrained` finds it.

    Args:
        model: a named model or a timm model patched by hand.
        folder: where to; its parent is made if need be. A symbolic link to a folder is followed.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched, is not a timm model, or was edited so that timm does
            not rebuild it; or the folder can not be replaced.
        TypeError: model is not a module, or folder is not a path.
        FileExistsError: the folder holds something other than a saved model, or something beside one.
    """
    check_path("folder", folder)
    _saveable_record(model)
    target = replaceable(Path(folder))
    with replaced(target) as new:
        write_folder(model, new)
        write_card(model, new, target.name, f"local-dir:{target.name}", picture=False)
    return Path(folder)


def replaceable(folder: Path) -> Path:
    """The folder that a save replaces: absolute, without symbolic links. A save that was killed is put right first.

    Raises:
        ValueError, FileExistsError: it can not be replaced, as in `save_pretrained`.
    """
    target = folder.resolve()
    if folder.is_symlink() and not target.exists():
        raise ValueError(f"folder={str(folder)!r}: is a symbolic link to {target}, which is not there; remove the link")
    reason = "the current folder" if target == Path.cwd() else "a mount point" if target.is_mount() else None
    if reason is not None:
        raise ValueError(
            f"folder={str(folder)!r}: is {reason}, which can not be replaced as a whole; use a folder inside it, as"
            f" {str(folder / 'model')!r}"
        )
    restore(target)
    _check_replaceable(target, str(folder))
    return target


def write_folder(model: nn.Module, folder: Path) -> None:
    """Write a model's weights and configuration into an empty folder.

    Raises:
        ValueError: as `save_pretrained`.
    """
    record = _saveable_record(model)
    _warn_of_unsaved_settings(model)
    _write_config(model, record, folder / CONFIG)
    save_file(_tensors(model), folder / WEIGHTS, {"format": "pt"})
    _require_rebuild(folder)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it. A tensor that has two names is written under both, as timm reads it."""
    tensors: dict[str, Tensor] = {}
    storages = set()
    for key, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(f"model: {key} is on the meta device and has no values to save; load weights first")
        storage = value.untyped_storage().data_ptr()
        tensors[key] = value.clone(memory_format=torch.contiguous_format) if storage in storages else value.contiguous()
        storages.add(storage)
    return tensors


def _require_rebuild(folder: Path) -> None:
    """Refuse a model whose tensors do not fit into what its configuration builds."""
    try:
        check_folder(folder)
    except ValueError as error:
        reason = str(error).replace(f"{folder / CONFIG}: ", "")
        raise ValueError(
            f"model: timm does not rebuild it from its arguments, so that it was edited by hand: {reason}; use"
            " create_model's arguments and reset_classifier instead, or save its state_dict() with safetensors"
        ) from error


def _warn_of_unsaved_settings(model: nn.Module) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvReplacement)}
    settings = {name: layer.unsaved_setting() for name, layer in layers.items()}
    unsaved = [f"{name} ({setting})" for name, setting in settings.items() if setting is not None]
    if unsaved:
        warnings.warn(
            f"saved without what was set on layers later, set it again after loading: {', '.join(unsaved)}",
            UserWarning,
            stacklevel=4,
        )


def _saveable_record(model: nn.Module) -> PatchRecord | MergedRecord | None:
    """The record of a model that can be saved; None for the papers' own networks.

    Raises:
        ValueError: the model is not patched, or was not made by timm.
    """
    check_module(model)
    if isinstance(model, OptimizedModule):
        raise ValueError(
            f"model: a compiled {type(model._orig_mod).__name__}: pass the model that was compiled, model._orig_mod"
        )
    merged: MergedRecord | None = model.__dict__.get(MERGED)
    record = merged or (None if _is_own_architecture(model) else require_record(model))
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"model: this {type(model).__name__} was not made by timm, which could not rebuild it; save its"
            " state_dict() with safetensors and its patch with tcc.report(model).patch"
        )
    return record


def _check_replaceable(folder: Path, given: str) -> None:
    """Refuse to replace what was not written by `save_pretrained`: all of the folder would be gone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"folder={given!r}: is a file; choose another")
    paths = {path.name: path for path in folder.iterdir()}
    others = sorted(name for name, path in paths.items() if name not in FILES or not path.is_file())
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise FileExistsError(
            f"folder={given!r}: holds something other than a saved model: {shown}. A saved model replaces the"
            f" whole folder; choose a new one, as {str(Path(given) / 'model')!r}"
        )
    if missing := sorted({CONFIG, WEIGHTS} - paths.keys() if paths else ()):
        raise FileExistsError(
            f"folder={given!r}: holds something other than a saved model: {', '.join(sorted(paths))}, but no"
            f" {' and no '.join(missing)}; choose another"
        )


def _is_own_architecture(model: nn.Module) -> bool:
    """Whether the model is one of the papers' own networks: built of our layers, rather than patched."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    ours = isinstance(name, str) and timm.is_model(name) and name not in PATCHED and name != HAND_PATCHED
    layers = any(isinstance(module, ConvReplacement) for module in model.modules())
    return ours and layers and get_record(model) is None


def _write_config(model: nn.Module, record: PatchRecord | MergedRecord | None, path: Path) -> None:
    """timm's configuration; for a model patched by hand, or merged, with {base, base_args, patch} as its arguments.

    The number of classes stands in the configuration itself. transformers gives it to timm besides the arguments.
    """
    arguments = {k: v for k, v in get_model_args(model).items() if k not in RESERVED and k != "num_classes"}
    overlay: dict[str, Any] = {}
    is_merged = isinstance(record, MergedRecord)
    if record is not None and (is_merged or record.architecture in (None, HAND_PATCHED)):
        arguments = _hand_patched_args(model, record, arguments)
        overlay = {"pretrained_cfg": {"architecture": HAND_PATCHED}}
    if isinstance(record, MergedRecord):
        arguments["merged"] = describe_merged(model, record)
    save_config_for_hf(model, str(path), overlay)
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_args"] = arguments
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _hand_patched_args(
    model: nn.Module, record: PatchRecord | MergedRecord, arguments: dict[str, Any]
) -> dict[str, Any]:
    base: str = model.__dict__["pretrained_cfg"]["architecture"]
    if base in PATCHED:  # a named model whose patch was taken off and another put on
        base = PATCHED[base].base
        arguments.pop("patch_args", None)
    elif base == HAND_PATCHED:
        saved = {key: arguments.pop(key) for key in ("base", "base_args", "patch")}
        arguments.pop("merged", None)
        base, arguments = saved["base"], {**saved["base_args"], **arguments}
        arguments.pop("num_classes", None)
    return {"base": base, "base_args": arguments, "patch": record.spec.to_dict()}
