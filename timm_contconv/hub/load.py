"""Load a model from a folder or a repository."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn

from .build import check_folder
from .checks import BUILD_ERRORS, CONFIG, WEIGHTS, check_config, check_path
from .download import download
from .exchange import restore
from .skeleton import build_checked

__all__ = ["from_pretrained"]

PACKAGE = __name__.partition(".")[0]


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
    check_path("id_or_folder", id_or_folder)
    _check_arguments(kwargs)
    folder = _folder(id_or_folder, revision, token=token, cache_dir=cache_dir)
    architecture = check_config(folder / CONFIG)
    try:
        return _build(folder, architecture, kwargs)
    except (ValueError, *BUILD_ERRORS) as error:
        if kwargs and _is_buildable(folder):
            given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise ValueError(
                f"{given}: timm can't build this {architecture} so, while it can with the arguments that were saved;"
                f" change it or leave it out: {type(error).__name__}: {error}"
            ) from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{folder / CONFIG}: timm can't build {architecture} from it: {type(error).__name__}: {error}"
        ) from error


def _is_buildable(folder: Path) -> bool:
    """Whether the model can be built with the arguments that were saved."""
    try:
        check_folder(folder)
    except ValueError:
        return False
    return True


def _build(folder: Path, architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model with its weights. For architectures of this package build.py checks what is checked here for timm's."""
    name = f"local-dir:{folder}"
    if timm.models.model_entrypoint(architecture).__module__.startswith(f"{PACKAGE}."):
        return timm.create_model(name, pretrained=True, **arguments)
    return build_checked(
        lambda: timm.create_model(name),
        lambda: timm.create_model(name, pretrained=True, **arguments),
        folder / WEIGHTS,
        str(folder / CONFIG),
    )


def _folder(id_or_folder: str | Path, revision: str | None, **options: Any) -> Path:
    """The folder with configuration and weights, which are downloaded if need be."""
    folder = Path(id_or_folder)
    restore(folder.resolve())
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2:
            raise FileNotFoundError(f"id_or_folder={str(id_or_folder)!r}: {_why_not_a_folder(folder)}")
        return _download(str(id_or_folder), revision, **options)
    if revision is not None:
        raise ValueError(f"revision={revision!r}: {str(folder)!r} is a folder, which has no revisions; leave it out")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"id_or_folder={str(id_or_folder)!r}: has no {name}; tcc.save_pretrained writes one"
            )
    return folder


def _why_not_a_folder(path: Path) -> str:
    if path.is_file():
        return f"is a file; give its folder, {str(path.parent)!r}"
    if timm.is_model(str(path)):
        return f"is an architecture, not saved weights; timm.create_model({str(path)!r}) builds it"
    return "no such folder, and not a Hub repository (user/name)"


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if "pretrained" in arguments:
        raise ValueError(
            f"pretrained={arguments['pretrained']!r}: not an argument of from_pretrained, which always loads weights;"
            ' leave it out (timm.create_model("local-dir:FOLDER") builds a model without)'
        )
    num_classes = arguments.get("num_classes")
    if num_classes is not None and not (isinstance(num_classes, Integral) and int(num_classes) >= 0):
        raise ValueError(f"num_classes={num_classes!r}: expected an int of at least 0; leave it out for the saved one")


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
