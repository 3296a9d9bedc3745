"""The model card: metadata that the Hub validates, how to use the model, what its patch changed, a picture."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..layers import ConvReplacement
from ..patching import PatchReport, report
from ..patching.record import MERGED, MergedRecord, PatchRecord

__all__ = ["CardFacts", "write_card"]

CARD, PICTURE = "README.md", "kernels.png"


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card says that the model does not know.

    Attributes:
        name: title, and the model's name beside its results.
        source: what `timm.create_model` loads the model by, as "hf-hub:me/model".
        tags: beside timm, timm_contconv and the method's name.
        license: the Hub's identifier; None to say nothing.
        datasets: identifiers of the data that it was trained on.
        base_model: identifier of the model whose weights it started from.
        eval_results: measurements, by huggingface_hub's `EvalResult`.
        text: a paragraph, as where the weights come from.
    """

    name: str
    source: str
    tags: Sequence[str] = ()
    license: str | None = None
    datasets: Sequence[str] = ()
    base_model: str | None = None
    eval_results: Sequence[EvalResult] = ()
    text: str = ""


def write_card(
    model: nn.Module,
    record: PatchRecord | MergedRecord | None,
    facts: CardFacts,
    folder: Path,
    picture: bool = True,
) -> None:
    """Write the card and, with the extra `viz`, a picture of kernels beside it.

    Args:
        model: a named model or one patched by hand.
        record: of its patch, or of what it was before it was merged; None for the papers' own networks.
        facts: what the model does not know.
        folder: where to.
        picture: with False, only the card; drawing takes a second or two.

    Raises:
        ValueError: what was given makes no valid metadata.
    """
    changes = report(model) if isinstance(record, PatchRecord) else None
    layers = [module for module in model.modules() if isinstance(module, ConvReplacement)]
    method = record.spec.layer.method if record is not None else layers[0].method
    sections = (
        f"# {facts.name}",
        _summary(model, changes),
        facts.text,
        _usage(facts.source),
        _results(facts.eval_results),
        _picture(model, folder) if layers and picture else "",
        "" if changes is None else _table(changes),
    )
    text = f"---\n{_metadata(facts, method)}\n---\n" + "\n\n".join(section for section in sections if section) + "\n"
    ModelCard(text)  # raises where the metadata can not be read back
    (folder / CARD).write_text(text, encoding="utf-8")


def _metadata(facts: CardFacts, method: str) -> str:
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["timm", "timm_contconv", method, *facts.tags])),
        license=facts.license,
        datasets=list(facts.datasets) or None,
        base_model=facts.base_model,
        metrics=list(dict.fromkeys(result.metric_type for result in facts.eval_results)) or None,
        model_name=facts.name if facts.eval_results else None,
        eval_results=list(facts.eval_results) or None,
    )
    return data.to_yaml()


def _summary(model: nn.Module, changes: PatchReport | None) -> str:
    if isinstance(record := model.__dict__.get(MERGED), MergedRecord):
        what = record.spec.description or record.spec.layer.method
        return f"{what}, merged: plain convolutions, {sum(p.numel() for p in model.parameters()):,} parameters."
    if changes is None:
        name = model.__dict__["pretrained_cfg"]["architecture"]
        return f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters."
    what = changes.patch.get("description") or changes.patch["layer"]["method"]
    return f"{what}: {changes.parameters_before:,} parameters before the patch,\n{changes.parameters_after:,} after."


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
        warnings.warn("the model card has no picture of kernels: install timm_contconv[viz]", stacklevel=5)
        return ""
    from ..inspect.figures import kernels

    kernels(model).save(folder / PICTURE)
    return f"![Learned kernels]({PICTURE})"


def _table(changes: PatchReport) -> str:
    rows = "\n".join(f"| {r.name} | {r.before} | {r.after} | {r.parameters_after} |" for r in changes.rows)
    return f"| layer | before | after | parameters |\n|---|---|---|---|\n{rows}"
