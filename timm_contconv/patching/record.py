"""PatchRecord: what a patch did to a model, kept on the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..layers import ConvReplacement
from ..layers.replacement import PlainConv
from .rewire import Rewired
from .spec import PatchSpec

__all__ = ["PatchRecord", "get_record", "require_record", "set_record"]

_ATTRIBUTE = "_timm_contconv_patch"


@dataclass(frozen=True)
class PatchRecord:
    """What a patch did.

    Attributes:
        spec: the patch, with everything filled in that was computed for this model.
        replaced: the convolution that each replaced layer's name held, on the meta device (no weights).
        left_alone: selected convolutions that were not replaced, and why.
        homes: modules that hold a shared geometry: (module name, attribute).
        rewired: what else was changed in the model, with the old values.
        fit_errors: relative error of each replaced kernel at the start, by name; empty for a random start.
        architecture: the registered name that the model was built by; None for a model patched by hand.
    """

    spec: PatchSpec
    replaced: dict[str, PlainConv]
    left_alone: dict[str, str] = field(default_factory=dict)
    homes: tuple[tuple[str, str], ...] = ()
    rewired: tuple[Rewired, ...] = ()
    fit_errors: dict[str, float] = field(default_factory=dict)
    architecture: str | None = None


def get_record(model: nn.Module) -> PatchRecord | None:
    """The record of the patch on this model, None where there is none."""
    return model.__dict__.get(_ATTRIBUTE)


def require_record(model: nn.Module) -> PatchRecord:
    """The record of the patch on this model.

    Raises:
        ValueError: the model is not patched, or what the patch put there is gone.
    """
    record = get_record(model)
    if record is None:
        raise ValueError(
            f"model: this {type(model).__name__} is not patched; tcc.patch(model, recipe) patches a model. A merged"
            " one is plain PyTorch: save its state_dict(). A feature extractor or another wrapper around a patched"
            " model has no record: pass the model itself"
        )
    gone = _gone(model, record)
    if gone:
        raise ValueError(
            f"model: changed since it was patched: what the patch put at {', '.join(gone)} is there no more;"
            " tcc.merge(model) and state_dict() still work"
        )
    return record


def _gone(model: nn.Module, record: PatchRecord) -> list[str]:
    """Names of layers that the patch put in, and of modules that it changed, that the model no longer has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [name for name in record.replaced if not isinstance(modules.get(name), ConvReplacement)]
    owners = [f"{change.owner}.{change.attribute}" for change in record.rewired if change.owner not in modules]
    return [*layers, *owners]


def set_record(model: nn.Module, record: PatchRecord | None) -> None:
    """Put a record on a model, or take it off."""
    if record is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = record
