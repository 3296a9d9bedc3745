"""timm's builder, for configurations that strangers wrote: what `hf-hub:` and `local-dir:` names bring is checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..layers.core.replacement import undecayed_names
from .checks import CONFIG, WEIGHTS, check_foreign
from .download import download
from .skeleton import build_checked, check_skeleton

__all__ = ["build_model_with_cfg", "check_folder"]

#: arguments in which the model that is wanted may differ from the one that was saved
CALLERS = frozenset(
    (
        *("num_classes", "in_chans", "global_pool", "device", "dtype"),
        *("features_only", "out_indices", "feature_cls", "feature_cfg", "pruned"),
    )
)


def build_model_with_cfg(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """As timm's function of that name; a configuration from the Hub or a folder is checked first.

    A feature extractor gets a `no_weight_decay` for timm's optimiser factory.

    The weights of such a model are the safetensors file beside the configuration, compared with the Hub's hash. The
    model is built on the meta device, as the configuration alone describes it, and compared with the file.

    Raises:
        ValueError: the configuration asks for what is not allowed, or the weights are damaged or do not fit.
        FileNotFoundError: there is no safetensors file.
        HfHubHTTPError, OSError: the Hub said no, or did not answer.
    """
    model = _build(model_cls, variant, pretrained, **kwargs)
    if not hasattr(model, "no_weight_decay"):  # timm's feature extractors
        model.no_weight_decay = functools.partial(set, frozenset(undecayed_names(model)))
    return model


def _build(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    config = kwargs.get("pretrained_cfg")
    if not isinstance(config, dict) or config.get("source") not in ("hf-hub", "local-dir"):
        return timm.models.build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    saved_args = kwargs.get("pretrained_model_args") or {}
    where = config["hf_hub_id"] if config["source"] == "hf-hub" else str(Path(config["file"]) / CONFIG)
    strangers = {k: v for k, v in config.items() if k not in ("file", "hf_hub_id", "source")}  # timm filled these in
    check_foreign(strangers, saved_args, f"{where}: ")
    weights, kwargs["pretrained_cfg"] = _weights(config, pretrained, kwargs.get("cache_dir"))
    saved = {k: saved_args.get(k, v) for k, v in kwargs.items() if k in saved_args or k not in CALLERS}
    return build_checked(
        lambda: timm.models.build_model_with_cfg(model_cls, variant, False, **saved),
        lambda: timm.models.build_model_with_cfg(model_cls, variant, pretrained, **kwargs),
        weights,
        where,
    )


def check_folder(folder: Path) -> None:
    """Build a saved model as it was saved, without memory, and compare it with its weights.

    Raises:
        ValueError: as `build_checked`.
    """
    check_skeleton(lambda: timm.create_model(f"local-dir:{folder}"), folder / WEIGHTS, str(folder / CONFIG))


def _weights(
    config: dict[str, Any], pretrained: bool, cache_dir: str | Path | None
) -> tuple[Path | None, dict[str, Any]]:
    """The weights file, and the configuration that names no other. None if a repository's weights are not wanted."""
    if config["source"] == "local-dir":
        path = Path(config["file"]) / WEIGHTS
        if path.is_file():
            return path, config
        if pretrained:
            raise FileNotFoundError(f"{config['file']}: has no {WEIGHTS}; pickle files are not loaded from a folder")
        return None, config
    if not pretrained:
        return None, config
    repo_id, _, revision = config["hf_hub_id"].partition("@")
    path = download(repo_id, WEIGHTS, revision or None, cache_dir=cache_dir)
    pinned = f"{repo_id}@{path.parent.name}"  # so that timm loads the file that was checked
    return path, {**config, "hf_hub_id": pinned, "hf_hub_filename": WEIGHTS}
