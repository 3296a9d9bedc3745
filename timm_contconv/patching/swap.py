"""Putting modules in the place of others, and what a patch leaves on a model besides them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from ..layers import ConvReplacement
from ..layers.once import compute_separately
from .record import PatchRecord, set_record

__all__ = [
    "copy_without_hooks",
    "exempt_from_weight_decay",
    "geometry_homes",
    "remove_traces",
    "swap",
    "with_hooks",
]

Module = TypeVar("Module", bound=nn.Module)

HOOKS = tuple(name for name in nn.Module().__dict__ if "_hook" in name)


def with_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Let the new module run the old one's hooks: the same dicts, so that handles still remove them."""
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]
    return new


def copy_without_hooks(module: Module) -> Module:
    """A deep copy that runs no hook of the user's, nor holds what such a hook refers to.

    Hooks of PyTorch (weight norm) and of this package compute what a forward needs: they stay.
    """
    hooks = [table for m in module.modules() for name in HOOKS if isinstance(table := m.__dict__.get(name), dict)]
    return copy.deepcopy(module, {id(table): _without_users(table) for table in hooks})


def _without_users(hooks: dict[int, Any]) -> dict[int, Any]:
    kept = {key: hook for key, hook in hooks.items() if isinstance(hook, bool) or _is_needed(hook)}
    return type(hooks)(kept)


def _is_needed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] in ("torch", __name__.partition(".")[0])


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules in the place of others, wherever the model refers to those; returns what undoes it."""
    by_id = {id(model.get_submodule(name)): new for name, new in replacements.items()}
    done: list[tuple[nn.Module, str, nn.Module]] = []

    def undo() -> None:
        for parent, attribute, child in done:
            parent._modules[attribute] = child

    try:
        for parent in list(model.modules()):
            for attribute, child in list(parent._modules.items()):
                if child is not None and id(child) in by_id:
                    done.append((parent, attribute, child))
                    setattr(parent, attribute, by_id[id(child)])
    except BaseException:
        undo()
        raise
    return undo


def geometry_homes(model: nn.Module, groups: Sequence[Sequence[str]], method: str) -> tuple[tuple[str, str], ...]:
    """Where each group's shared geometry is registered: (module name, attribute)."""
    homes: list[tuple[str, str]] = []
    for group in groups:
        home = _home(model, group)
        taken = sum(other == home for other, _ in homes)
        homes.append((home, f"{method}_geometry_{taken + 1}" if taken else f"{method}_geometry"))
    return tuple(homes)


def _home(model: nn.Module, group: Sequence[str]) -> str:
    """The innermost module that holds the whole group, so that FSDP has the geometry at hand for all of it.

    Not a container, which would run it as a layer, nor the model itself, of which feature extractors take only
    parts: there the group's first layer holds it.
    """
    common: list[str] = []
    for step in zip(*(name.split(".") for name in group), strict=False):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    while common and isinstance(model.get_submodule(".".join(common)), nn.Sequential | nn.ModuleList | nn.ModuleDict):
        common.pop()
    return ".".join(common) if common else group[0]


def remove_traces(model: nn.Module, record: PatchRecord | None) -> None:
    """Take off what a patch put on modules other than the convolutions, where these are still in the model."""
    if record is None:
        return
    modules = dict(model.named_modules())
    for home, attribute in record.homes:
        if home in modules:
            modules[home]._modules.pop(attribute, None)
            compute_separately(modules[home])
    set_record(model, None)
    model.__dict__.pop("no_weight_decay", None)


def exempt_from_weight_decay(model: nn.Module) -> None:
    """Add the geometry parameters to what timm's optimiser factory asks a model for."""
    names = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    geometry = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, ConvReplacement)
        for parameter in module.geometry.values()
    }
    names.update(name for name, parameter in model.named_parameters() if id(parameter) in geometry)
    model.__dict__["no_weight_decay"] = functools.partial(set, frozenset(names))
