"""timm's builder, for configurations of strangers too: what `hf-hub:` and `local-dir:` names bring is checked first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.models
from timm.models._hub import hf_split
from torch import nn

from ..download import download
from ..untrusted import WEIGHTS, Weights, check_kernels, check_pretrained_cfg, check_weights, memory_bound

__all__ = ["build_model_with_cfg"]


def build_model_with_cfg(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """As timm's function of that name; a configuration from the Hub or a folder is checked, and its memory bounded.

    The weights of such a model are the safetensors file beside the configuration, checked against the Hub's hash,
    whatever else is there.

    Raises:
        ValueError: the configuration asks for what no architecture needs, or the weights are damaged.
        FileNotFoundError: there is no safetensors file.
        HfHubHTTPError, OSError: the Hub said no, or did not answer.
    """
    config = kwargs.get("pretrained_cfg")
    if not isinstance(config, dict) or config.get("source") not in ("hf-hub", "local-dir"):
        return timm.models.build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    check_pretrained_cfg({k: v for k, v in config.items() if k != "source"}, "pretrained_cfg", sources=True)
    if pretrained and config["source"] == "hf-hub":
        kwargs["pretrained_cfg"] = {**config, "hf_hub_filename": WEIGHTS}
    with memory_bound(_weights(config, kwargs.get("cache_dir")) if pretrained else None):
        model = timm.models.build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    check_kernels(model)
    return model


def _weights(config: dict[str, Any], cache_dir: str | Path | None) -> Weights:
    """The size of the weights beside a configuration, which are downloaded if need be."""
    if config["source"] == "hf-hub":
        repo_id, revision = hf_split(config["hf_hub_id"])
        return check_weights(download(repo_id, WEIGHTS, revision, cache_dir=cache_dir))
    path = Path(config["file"]) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{config['file']}: has no {WEIGHTS}; pickle files are not loaded from a folder")
    return check_weights(path)
