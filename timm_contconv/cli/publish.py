"""`contconv publish`: load, convert and verify a weight of hub/, upload it to the Hugging Face Hub, record that."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
from huggingface_hub import HfApi
from rich.console import Console
from safetensors import SafetensorError
from timm.models import set_pretrained_download_progress
from timm.models._hub import get_cache_dir
from torch import nn

from ..hub.download import explain_errors
from ..hub.push import push_to_hub
from ..hub.weights import TRAINING, Weight, record_publication, timm_cfg

__all__ = ["run"]

#: errors of timm and PyTorch for files without weights
READ_ERRORS = (AttributeError, EOFError, LookupError, RuntimeError, SafetensorError, pickle.UnpicklingError)


def run(console: Console, folder: Path, *, file: Path | None, repo_id: str | None, **options: Any) -> None:
    """Publish a weight and record it in its folder.

    Args:
        console, folder, file, repo_id: as for `contconv publish`. A pickle is loaded as weights only, and runs no code.
        **options: private, revision and create_pr of `push_to_hub`.

    Raises:
        ValueError, OSError: the weight can't be loaded, verified or uploaded.
    """
    weight = Weight.load(folder)
    if repo_id is None:
        with explain_errors("--repo-id was not given, and your name was not found", None):
            repo_id = f"{HfApi().whoami()['name']}/{weight.name}"
    console.print(f"{weight.name}: loading and converting", highlight=False)
    model, source = _load(weight, folder, file)
    with source.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    console.print(f"{source}: SHA-256 {digest}", highlight=False, soft_wrap=True)
    console.print(f"verifying, then publishing as {repo_id}", highlight=False)
    info = push_to_hub(
        model,
        repo_id,
        license=weight.pretrained_cfg.get("license"),
        datasets=weight.datasets,
        eval_results=weight.eval_results(),
        text=_provenance(weight, folder, source, digest),
        **options,
    )
    url = info.pr_url or info.commit_url
    record = record_publication(folder, repo_id=repo_id, commit=info.oid, url=url, source_sha256=digest)
    console.print(f"published: {url}\nrecorded in {record}", highlight=False, soft_wrap=True)


def _load(weight: Weight, folder: Path, file: Path | None) -> tuple[nn.Module, Path]:
    """The model with its weights, and the file of the weights."""
    config = {"architecture": weight.architecture, "tag": weight.tag, **timm_cfg(weight.pretrained_cfg, folder)}
    url = weight.pretrained_cfg.get("url")
    if file is None and "file" in config:
        file = Path(config["file"])
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"--file={str(file)!r}: no such file")
        config |= {"url": None, "file": str(file)}
    elif not url:
        raise ValueError(f"{weight.name}: there is no URL to download it from; get the file and pass --file")
    else:
        set_pretrained_download_progress(True)
    overlay = {"hf_hub_id": None, "file": None, **config}
    try:
        model = timm.create_model(weight.architecture, pretrained=True, pretrained_cfg_overlay=overlay)
    except READ_ERRORS as error:
        raise ValueError(
            f"{file or url}: holds no weights of {weight.architecture} that can be read:"
            f" {type(error).__name__}: {error}"
        ) from error
    return model, file or Path(get_cache_dir()) / Path(urlsplit(str(url)).path).name


def _provenance(weight: Weight, folder: Path, source: Path, digest: str) -> str:
    """Text for the model card: source of the weights, who measured the results, training arguments."""
    origin = weight.pretrained_cfg.get("origin_url")
    where = weight.pretrained_cfg.get("url") or weight.source or f"hub/{folder.name}"
    paragraphs = [
        weight.pretrained_cfg.get("description", ""),
        f"Converted from {source.name} ({where}; SHA-256 {digest})" + (f", released at {origin}." if origin else "."),
        *(f"{r.dataset}: {r.metric} {r.value} %, measured by {r.by}." for r in weight.results),
    ]
    training = folder / TRAINING
    if training.is_file():
        paragraphs.append(f"Training arguments:\n\n```yaml\n{training.read_text(encoding='utf-8').strip()}\n```")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
