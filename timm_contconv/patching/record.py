"""PatchRecord: what a patch did to a model, kept on the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..layers import ConvReplacement
from ..layers.core.plain import PlainConv
from .spec import PatchSpec
from .stem_pool import Rewired
from .transaction import Transaction

__all__ = ["RECORD", "PatchRecord", "get_record", "remove_record", "require_record", "set_architecture"]

#: the attribute of a model that holds its record
RECORD = "_timm_contconv_patch"


@dataclass(frozen=True)
class PatchRecord:
    """What a patch did.

    Attributes:
        spec: the patch, with everything filled in that was computed for this model.
        replaced: the convolution that each replaced layer's name held, on the meta device (no weights).
        refused: selected convolutions that were not replaced, and why.
        homes: modules that hold a shared geometry: (module name, attribute).
        rewired: what else was changed in the model, with the old values.
        unfoldable: blocks that refuse to fold themselves since.
        fit_errors: relative error of each replaced kernel at the start, by name; empty for a random start.
        no_weight_decay: what the model's own attribute of that name was; None if it had none.
        architecture: the registered name that the model was built by; None for a model patched by hand.
    """

    spec: PatchSpec
    replaced: dict[str, PlainConv]
    refused: dict[str, str] = field(default_factory=dict)
    homes: tuple[tuple[str, str], ...] = ()
    rewired: tuple[Rewired, ...] = ()
    unfoldable: tuple[str, ...] = ()
    fit_errors: dict[str, float] = field(default_factory=dict)
    no_weight_decay: Callable[[], set[str]] | None = None
    architecture: str | None = None


def get_record(model: nn.Module) -> PatchRecord | None:
    """The record of the patch on this model, None where there is none."""
    return model.__dict__.get(RECORD)


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


def set_architecture(model: nn.Module, name: str) -> None:
    """Note the registered name that a patched model was built by."""
    model.__dict__[RECORD] = dataclasses.replace(require_record(model), architecture=name)


def remove_record(model: nn.Module, changes: Transaction) -> None:
    """Take off what a patch put on a model besides its layers, as far as that is still there."""
    record = get_record(model)
    if record is None:
        return
    modules = dict(model.named_modules())
    for home, attribute in record.homes:
        if home in modules:
            changes.remove(modules[home], attribute)
    changes.remove(model, RECORD)
    if record.no_weight_decay is None:
        changes.remove(model, "no_weight_decay")
    else:
        changes.set(model, "no_weight_decay", record.no_weight_decay)
