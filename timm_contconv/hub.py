"""Saving patched models to a folder that timm loads, and loading them again."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import save_file
from timm.models._hub import load_cfg_from_json, save_config_for_hf
from timm.models._input import get_model_args, get_model_input_config
from torch import Tensor, nn

from .download import download
from .layers import ConvReplacement
from .model_card import CARD, PICTURE, CardFacts, write_card
from .models.patched import HAND_PATCHED, PATCHED
from .patching.record import PatchRecord, get_record, require_record
from .untrusted import LARGEST_MODEL, WEIGHTS, check_config, check_weights, memory_bound

__all__ = ["from_pretrained", "save_pretrained", "verify_folder", "write_folder"]

CONFIG = "config.json"
#: everything that `write_folder` may write
FILES = frozenset((CONFIG, WEIGHTS, CARD, PICTURE))
#: what timm's architectures raise for arguments that make no sense to them
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
#: what to do with a model that its configuration does not rebuild
WAYS_OUT = "use create_model's arguments and reset_classifier instead, or save its state_dict() with safetensors"


def save_pretrained(model: nn.Module, folder: str | Path) -> Path:
    """Write a patched timm model to a folder: weights, configuration, model card.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` and `from_pretrained` load it. A model of a named
    architecture is saved under its name; one patched by hand under "contconv", which rebuilds it from its base and
    its patch. The folder appears when it is whole; a saved model that is there is replaced by the new one.

    Args:
        model: a named model or a timm model patched by hand.
        folder: where to; its parent is made if need be.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched (merged models too), is not a timm model, or was edited so that timm does
            not rebuild it.
        FileExistsError: the folder holds something other than a saved model, or something beside one.
    """
    _saveable_record(model)
    folder = Path(folder)
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        staged = Path(temporary) / "model"
        staged.mkdir()
        write_folder(model, staged, CardFacts(folder.name, f"local-dir:{folder.name}"))
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        staged.rename(folder)
    return folder


def write_folder(model: nn.Module, folder: Path, facts: CardFacts) -> None:
    """Write a model's files into an empty folder, with a card that says `facts`.

    Raises:
        ValueError: as `save_pretrained`, or `facts` makes no valid metadata.
    """
    record = _saveable_record(model)
    _warn_of_unsaved_settings(model)
    _write_config(model, record, folder / CONFIG)
    _require_rebuild(model, folder)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS, {"format": "pt"})
    write_card(model, record, facts, folder)


def _require_rebuild(model: nn.Module, folder: Path) -> None:
    """Refuse a model whose tensors would not fit into what its configuration builds.

    Raises:
        ValueError: names a tensor, or what timm says of the configuration.
    """
    held = _shapes(model)
    with contextlib.suppress(*BUILD_ERRORS, ValueError):  # some architectures are not built on the meta device
        if _rebuilt_shapes(folder, "meta") == held:
            return
    try:
        rebuilt = _rebuilt_shapes(folder, "cpu")
    except BUILD_ERRORS as error:
        raise ValueError(
            f"model: timm can't rebuild it from its arguments: {type(error).__name__}: {error}; {WAYS_OUT}"
        ) from error
    for key in (*held, *rebuilt):
        ours, theirs = held.get(key, "missing"), rebuilt.get(key, "missing")
        if ours != theirs:
            raise ValueError(
                f"model: its {key} is {ours}, and {theirs} where timm rebuilds it from its arguments: it was edited by"
                f" hand; {WAYS_OUT}"
            )


def _rebuilt_shapes(folder: Path, device: str) -> dict[str, tuple[int, ...]]:
    """Of a model that is built from a folder's configuration; random numbers are drawn as if it were not."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # said when the model itself was built
        with torch.device(device), memory_bound(LARGEST_MODEL):
            return _shapes(timm.create_model(f"local-dir:{folder}"))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


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


def from_pretrained(
    id_or_folder: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a model that `save_pretrained` or `push_to_hub` wrote.

    Files from the Hub are of one commit and have the hashes that the Hub announces. Only `model.safetensors` is
    loaded, never a pickle; the configuration is checked before anything is built from it. Without network, or
    with HF_HUB_OFFLINE=1, what is in the Hub's cache is taken.

    Args:
        id_or_folder: path of a folder, or the name of a repository on the Hugging Face Hub ("user/name").
        revision: branch, tag or commit of the repository; "main" if None.
        token: as huggingface_hub takes it: None for the one of `hf auth login`.
        cache_dir: instead of the Hub's cache.
        **kwargs: arguments of `timm.create_model`, as num_classes; not `pretrained`.

    Raises:
        FileNotFoundError: the folder has no config.json or no model.safetensors.
        HfHubHTTPError, OSError: the Hub said no, or did not answer; the message says what to do.
        ValueError: the configuration or an argument asks for something unknown or out of range, or the weights are
            damaged.
    """
    _check_arguments(kwargs)
    folder = Path(id_or_folder)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2:
            name = str(id_or_folder)
            raise FileNotFoundError(f"id_or_folder={name!r}: no such folder, and not a Hub repository (user/name)")
        folder = _download(str(id_or_folder), revision, token=token, cache_dir=cache_dir)
    elif revision is not None:
        raise ValueError(f"revision={revision!r}: {str(folder)!r} is a folder, which has no revisions; leave it out")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"id_or_folder={str(id_or_folder)!r}: has no {name}; tcc.save_pretrained writes one"
            )
    architecture = check_config(folder / CONFIG)["architecture"]
    try:
        return _load(folder, **kwargs)
    except BUILD_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        if kwargs and _loads(folder):
            given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise ValueError(
                f"{given}: timm can't build this {architecture} so, while it can with the arguments that were saved;"
                f" change it or leave it out: {reason}"
            ) from error
        raise ValueError(
            f"{folder / CONFIG}: timm can't build {architecture} from it, or its weights do not fit: {reason}"
        ) from error


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if "pretrained" in arguments:
        raise ValueError(
            f"pretrained={arguments['pretrained']!r}: not an argument of from_pretrained, which always loads weights;"
            ' leave it out (timm.create_model("local-dir:FOLDER") builds a model without)'
        )
    num_classes = arguments.get("num_classes")
    if num_classes is not None and not (isinstance(num_classes, Integral) and int(num_classes) >= 0):
        raise ValueError(f"num_classes={num_classes!r}: expected an int of at least 0; leave it out for the saved one")


def _load(folder: Path, **kwargs: Any) -> nn.Module:
    with memory_bound(check_weights(folder / WEIGHTS)):
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def _loads(folder: Path) -> bool:
    """Whether a folder can be loaded as it was saved."""
    try:
        _load(folder)
    except (*BUILD_ERRORS, ValueError):
        return False
    return True


@torch.no_grad()
def verify_folder(folder: Path, model: nn.Module) -> None:
    """Load a folder back and compare parameters, buffers and logits with the model's.

    Raises:
        ValueError: something differs, or the model's logits are not finite.
    """
    parameter = next(model.parameters())
    size = get_model_input_config(model)["input_size"]
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)
    with _evaluating(model):
        expected = model(images).float()
    if not expected.isfinite().all():
        raise ValueError("model: its logits are not finite for an ordinary image; train it again before publishing")
    loaded = from_pretrained(folder)
    _require_same_values(loaded.state_dict(), model.state_dict())
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, value in (*loaded.named_parameters(), *loaded.named_buffers()):
        value.data = value.data.to(ours[key].device, ours[key].dtype)
    actual = loaded.eval()(images).float()
    tolerance = torch.finfo(parameter.dtype).eps ** 0.5
    if (actual - expected).abs().max() > tolerance * expected.abs().max():
        raise ValueError(
            "model: loaded back from its files it gives other logits, so that it holds something that they do not: a"
            " hook, or an attribute that was changed by hand"
        )


def _require_same_values(loaded: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for key, value in saved.items():
        if not torch.equal(loaded[key].cpu(), value.cpu().to(loaded[key].dtype)):
            raise ValueError(f"{key}: what was loaded back is not what the model holds; its dtype is {value.dtype}")


def _download(repo_id: str, revision: str | None, **options: Any) -> Path:
    """The folder in the Hub's cache that holds configuration and weights of one commit."""
    config = download(repo_id, CONFIG, revision, **options)
    commit = config.parent.name
    try:
        return download(repo_id, WEIGHTS, commit, **options).parent
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id}: has no {WEIGHTS}, and pickle files are not loaded from a repository. If you trust its authors,"
            " download one and name it: timm.create_model(NAME, pretrained=True,"
            " pretrained_cfg_overlay=dict(file=PATH))"
        ) from error


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and every module in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _saveable_record(model: nn.Module) -> PatchRecord | None:
    """The record of a model that can be saved; None for the papers' own networks.

    Raises:
        ValueError: the model is not patched, or was not made by timm.
    """
    record = None if _is_own_architecture(model) else require_record(model)
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"model: this {type(model).__name__} was not made by timm, which could not rebuild it; save its"
            " state_dict() with safetensors and its patch with tcc.report(model).patch"
        )
    return record


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what was not written by `save_pretrained`: all of the folder would be gone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"folder={str(folder)!r}: is a file; choose another")
    paths = {path.name: path for path in folder.iterdir()}
    others = sorted(name for name, path in paths.items() if name not in FILES or not path.is_file())
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise FileExistsError(
            f"folder={str(folder)!r}: holds something other than a saved model: {shown}. A saved model replaces the"
            f" whole folder; choose a new one, as {str(folder / 'model')!r}"
        )
    if missing := sorted({CONFIG, WEIGHTS} - paths.keys() if paths else ()):
        raise FileExistsError(
            f"folder={str(folder)!r}: holds something other than a saved model: {', '.join(sorted(paths))}, but no"
            f" {' and no '.join(missing)}; choose another"
        )


def _is_own_architecture(model: nn.Module) -> bool:
    """Whether the model is one of the papers' own networks: built of our layers, rather than patched."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    ours = isinstance(name, str) and timm.is_model(name) and name not in PATCHED and name != HAND_PATCHED
    layers = any(isinstance(module, ConvReplacement) for module in model.modules())
    return ours and layers and get_record(model) is None


def _write_config(model: nn.Module, record: PatchRecord | None, path: Path) -> None:
    """timm's configuration; for a model patched by hand with {base, base_args, patch} as its arguments."""
    if record is None or (record.architecture is not None and record.architecture != HAND_PATCHED):
        save_config_for_hf(model, str(path))
        return
    save_config_for_hf(model, str(path), model_config={"pretrained_cfg": {"architecture": HAND_PATCHED}})
    config = load_cfg_from_json(path)
    config["model_args"] = _hand_patched_args(model, record)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _hand_patched_args(model: nn.Module, record: PatchRecord) -> dict[str, Any]:
    arguments = get_model_args(model)
    base: str = model.__dict__["pretrained_cfg"]["architecture"]
    if base in PATCHED:  # a named model whose patch was taken off and another put on
        base = PATCHED[base].base
        arguments.pop("patch_args", None)
    elif base == HAND_PATCHED:
        saved = {key: arguments.pop(key) for key in ("base", "base_args", "patch")}
        base, arguments = saved["base"], {**saved["base_args"], **arguments}
    return {"base": base, "base_args": arguments, "patch": record.spec.to_dict()}
