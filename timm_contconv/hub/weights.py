"""The folders of hub/: one per publishable weight, with where it comes from and what was published where."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import tomli_w
from huggingface_hub import EvalResult
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..paths import data_folder
from .checks import WEIGHTS, check_pretrained_cfg

__all__ = ["TRAINING", "Result", "Weight", "packaged_cfgs", "record_publication", "timm_cfg"]

WEIGHT, TRAINING, PUBLISHED = "weight.toml", "train.yaml", "published.toml"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Result(_Table):
    """A measurement.

    Attributes:
        dataset: identifier on the Hub.
        metric: "top1".
        value: in per cent.
        by: who measured it.
        split: part of the data.
        seeds: values from several trainings; the first is `value`.
    """

    dataset: str
    metric: str
    value: float
    by: str
    split: str | None = None
    seeds: tuple[float, ...] = ()


class Weight(_Table):
    """What a weight.toml says.

    Attributes:
        architecture: registered name.
        tag: of the weights, as timm writes it after a dot.
        pretrained_cfg: fields of timm's PretrainedCfg; `url` is where the file is today.
        source: in words, where the file is to be had that no URL leads to.
        datasets: identifiers of the data that it was trained on.
        training: settings of a training that has no train.yaml.
        results: measurements, and by whom.
    """

    architecture: str
    tag: str
    pretrained_cfg: dict[str, Any]
    source: str = ""
    datasets: tuple[str, ...] = ()
    training: dict[str, Any] = Field(default_factory=dict)
    results: tuple[Result, ...] = ()

    @property
    def name(self) -> str:
        """As timm names it: architecture.tag."""
        return f"{self.architecture}.{self.tag}"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder's weight.toml.

        Raises:
            FileNotFoundError: the folder has none.
            ValueError: it is not valid; the message names the file and the field.
        """
        path = folder / WEIGHT
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: has no {WEIGHT}; the folders of hub/ are examples")
        try:
            weight = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, ValidationError) as error:
            raise ValueError(f"{path}: {error}") from None
        url_free = {key: value for key, value in weight.pretrained_cfg.items() if key != "url"}
        check_pretrained_cfg(url_free, f"{path}: pretrained_cfg.")
        return weight

    def eval_results(self) -> list[EvalResult]:
        """The measurements for a model card."""
        origin = self.pretrained_cfg.get("origin_url")
        return [
            EvalResult(
                task_type="image-classification",
                dataset_type=result.dataset,
                dataset_name=result.dataset,
                dataset_split=result.split,
                metric_type="accuracy",
                metric_name=f"{result.metric} accuracy, %",
                metric_value=result.value,
                source_name=result.by if origin else None,
                source_url=origin,
            )
            for result in self.results
        ]


def packaged_cfgs() -> dict[tuple[str, str], dict[str, Any]]:
    """What timm takes of every folder of hub/, by architecture and tag.

    Importing the package calls this, so it validates no more than it reads; tests load every folder as a `Weight`.

    Raises:
        ValueError: as `Weight.load`, if a table can't be read or lacks one of these.
    """
    configs = {}
    for path in sorted(data_folder("hub").glob(f"*/{WEIGHT}")):
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            configs[table["architecture"], table["tag"]] = timm_cfg(table["pretrained_cfg"], path.parent)
        except (tomllib.TOMLDecodeError, KeyError):
            Weight.load(path.parent)
            raise
    return configs


def timm_cfg(pretrained_cfg: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """pretrained_cfg as timm takes it; `file` is the weights file in `folder`, where it comes with the package."""
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in pretrained_cfg.items()}
    if (folder / WEIGHTS).is_file():
        values["file"] = str(folder / WEIGHTS)
    return values


def record_publication(folder: Path, *, repo_id: str, commit: str, url: str, source_sha256: str) -> Path:
    """Add a publication of today to the folder's published.toml, which is made if need be.

    Args:
        folder: the weight's, of hub/.
        repo_id: repository on the Hub.
        commit: its revision.
        url: the commit's page.
        source_sha256: of the file that was converted.

    Returns:
        The file.
    """
    today = datetime.datetime.now(datetime.UTC).date()
    new = {"repo_id": repo_id, "commit": commit, "url": url, "day": today, "source_sha256": source_sha256}
    path = folder / PUBLISHED
    known = tomllib.loads(path.read_text(encoding="utf-8"))["published"] if path.is_file() else []
    path.write_text(tomli_w.dumps({"published": [*known, new]}), encoding="utf-8")
    return path
