"""The model card: metadata that the Hub validates, how to use the model, what its patch changed, a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..layers import ConvReplacement
from ..patching import PatchReport, report
from ..patching.record import MERGED, MergedRecord, PatchRecord, get_record

__all__ = ["write_card"]

CARD, PICTURE = "README.md", "kernels.png"


def write_card(
    model: nn.Module,
    folder: Path,
    name: str,
    source: str,
    *,
    picture: bool = True,
    tags: Sequence[str] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    eval_results: Sequence[EvalResult] = (),
    text: str = "",
) -> None:
    """Write the card and, with the extra `viz`, a picture of kernels beside it.

    Args:
        model: a named model, or one that was patched by hand or merged.
        folder: where to.
        name: title, and the model's name beside its results.
        source: what `timm.create_model` loads the model by, as "hf-hub:me/model".
        picture: with False, only the card; drawing takes a second or two.
        tags, license, datasets, base_model, eval_results, text: as for `push_to_hub`.

    Raises:
        ValueError: what was given makes no valid metadata.
    """
    record = model.__dict__.get(MERGED) or get_record(model)
    changes = report(model) if isinstance(record, PatchRecord) else None
    layers = [module for module in model.modules() if isinstance(module, ConvReplacement)]
    method = record.spec.layer.method if record is not None else layers[0].method
    metadata = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["timm", "timm_contconv", method, *tags])),
        license=license,
        datasets=list(datasets) or None,
        base_model=base_model,
        metrics=list(dict.fromkeys(result.metric_type for result in eval_results)) or None,
        model_name=name if eval_results else None,
        eval_results=list(eval_results) or None,
    )
    sections = (
        f"---\n{metadata.to_yaml()}\n---\n# {name}",
        _summary(model, record, changes),
        text,
        _usage(source),
        _results(eval_results),
        _picture(model, folder) if layers and picture else "",
        "" if changes is None else _table(changes),
    )
    card = "\n\n".join(section for section in sections if section) + "\n"
    ModelCard(card)  # raises where the metadata can not be read back
    (folder / CARD).write_text(card, encoding="utf-8")


def _summary(model: nn.Module, record: PatchRecord | MergedRecord | None, changes: PatchReport | None) -> str:
    if changes is not None:
        what = changes.patch.get("description") or changes.patch["layer"]["method"]
        after = f"{changes.parameters_after:,} after."
        return f"{what}: {changes.parameters_before:,} parameters before the patch,\n{after}"
    parameters = f"{sum(p.numel() for p in model.parameters()):,} parameters."
    if record is None:
        return f"{model.__dict__['pretrained_cfg']['architecture']}: {parameters}"
    return f"{record.spec.description or record.spec.layer.method}, merged: plain convolutions, {parameters}"


def _usage(source: str) -> str:
    return f"""```python
import timm, timm_contconv

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""


def _results(results: Sequence[EvalResult]) -> str:
    if not results:
        return ""
    rows = "\n".join(
        f"| {result.dataset_name}{'' if result.dataset_split is None else f', {result.dataset_split}'} |"
        f" {result.metric_name or result.metric_type} | {result.metric_value} |"
        f" {'' if result.source_name is None else f'[{result.source_name}]({result.source_url})'} |"
        for result in results
    )
    return f"| data | metric | value | source |\n|---|---|---|---|\n{rows}"


def _picture(model: nn.Module, folder: Path) -> str:
    if find_spec("vl_convert") is None:
        warnings.warn("the model card has no picture of kernels: install timm_contconv[viz]", stacklevel=4)
        return ""
    from ..inspect.figures import kernels

    kernels(model).save(folder / PICTURE)
    return f"![Learned kernels]({PICTURE})"


def _table(changes: PatchReport) -> str:
    rows = "\n".join(f"| {r.name} | {r.before} | {r.after} | {r.parameters_after} |" for r in changes.rows)
    return f"| layer | before | after | parameters |\n|---|---|---|---|\n{rows}"
