"""PatchRecord: what a patch did to a model. The model keeps it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layers import ConvReplacement
from ..layers.core.arguments import check_module
from ..layers.core.plain import PlainConv
from ..layers.core.shown import Quantity
from .spec import PatchSpec
from .stem_pool import Rewired
from .transaction import Transaction

__all__ = [
    "MERGED",
    "OVERRIDDEN",
    "RECORD",
    "MergedRecord",
    "PatchRecord",
    "Start",
    "get_record",
    "patched_inside",
    "remove_record",
    "require_record",
    "set_architecture",
]

#: the attribute of a model that holds its record
RECORD = "_timm_contconv_patch"
#: the attribute of a merged model that says what it was
MERGED = "_timm_contconv_merged"
#: the methods of a model that a patch gives anew
OVERRIDDEN = ("no_weight_decay", "group_matcher")


@dataclass(frozen=True)
class Start:
    """What a layer started from, for pictures.

    Attributes:
        kernels: (C_out, *size), of the replaced convolution, as `one_per_output` chooses them; on the CPU.
        quantities: the layer's `shown_quantities()` after the fit, on the CPU; none if they are not known.
    """

    kernels: Tensor
    quantities: tuple[Quantity, ...] = ()


@dataclass(frozen=True)
class PatchRecord:
    """What a patch did.

    Attributes:
        spec: the patch, completed with all settings that depend on the model.
        replaced: the replaced convolutions by module name, on the meta device (without weights).
        refused: selected convolutions that were not replaced, and why.
        homes: where each shared geometry is registered: (module name, attribute).
        rewired: other changes of the model, with the old values.
        unfoldable: names of blocks that now refuse to fold themselves.
        fit_errors: relative error of each kernel at the start, by name; empty for a random start.
        fit_tolerance: that of the fit; None for a random start, and for settings as in the method's paper.
        starts: what each layer was fitted to, by name; empty for a random start, and for a model that was loaded.
        overridden: the model's own attributes that the patch replaced, by name.
        architecture: the registered name of the model; None for a model patched by hand.
    """

    spec: PatchSpec
    replaced: dict[str, PlainConv]
    refused: dict[str, str] = field(default_factory=dict)
    homes: tuple[tuple[str, str], ...] = ()
    rewired: tuple[Rewired, ...] = ()
    unfoldable: tuple[str, ...] = ()
    fit_errors: dict[str, float] = field(default_factory=dict)
    fit_tolerance: float | None = None
    starts: dict[str, Start] = field(default_factory=dict)
    overridden: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None


@dataclass(frozen=True)
class MergedRecord:
    """What a merged model was.

    Attributes:
        spec: the patch.
        names: module names of the layers that became plain convolutions.
        architecture: as in `PatchRecord`.
    """

    spec: PatchSpec
    names: tuple[str, ...]
    architecture: str | None = None


def get_record(model: nn.Module) -> PatchRecord | None:
    """The record of the patch on this model; None if it is not patched."""
    return model.__dict__.get(RECORD)


def require_record(model: nn.Module) -> PatchRecord:
    """The record of the patch on this model.

    Raises:
        ValueError: the model is not patched, or parts of the patch were removed since.
        TypeError: model is not a module.
    """
    check_module(model)
    record = get_record(model)
    if record is None:
        raise ValueError(
            f"model: this {type(model).__name__} is not patched; tcc.patch(model, recipe) patches a model. A merged"
            " model is plain PyTorch: save its state_dict(). A feature extractor holds parts of a patched model and has"
            " no record: pass the model itself. A network that was built with such layers, as ccnet, has nothing to"
            " compare with: tcc.inspect(model) shows its layers"
        )
    gone = _gone(model, record)
    if gone:
        raise ValueError(
            f"model: changed since it was patched: the patch's modules at {', '.join(gone)} are gone; tcc.merge(model)"
            " and state_dict() still work"
        )
    return record


def patched_inside(model: nn.Module) -> nn.Module:
    """The patched model that a module is or holds; the module itself if it holds none.

    Raises:
        ValueError: it holds several.
    """
    found = {name: module for name, module in model.named_modules() if get_record(module) is not None}
    if len(found) > 1:
        raise ValueError(f"model: holds several patched models, {', '.join(found)}: pass one of them")
    return next(iter(found.values()), model)


def _gone(model: nn.Module, record: PatchRecord) -> list[str]:
    """Names of the patch's layers and changed modules that the model no longer has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [name for name in record.replaced if not isinstance(modules.get(name), ConvReplacement)]
    owners = [change.name for change in record.rewired if change.owner not in modules]
    return [*layers, *owners]


def set_architecture(model: nn.Module, name: str) -> None:
    """Record the registered name of a patched model."""
    model.__dict__[RECORD] = dataclasses.replace(require_record(model), architecture=name)


def remove_record(model: nn.Module, changes: Transaction) -> None:
    """Remove what a patch put on a model besides its layers, if it is still there."""
    record = get_record(model)
    if record is None:
        return
    modules = dict(model.named_modules())
    for home, attribute in record.homes:
        if home in modules:
            changes.remove(modules[home], attribute)
    changes.remove(model, RECORD)
    for name in OVERRIDDEN:
        changes.remove(model, name)
    for name, value in record.overridden.items():
        changes.set(model, name, value)
