"""Copies of modules without users' hooks; hooks handed from one module to another."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["copy_without_hooks", "with_hooks"]

Module = TypeVar("Module", bound=nn.Module)

HOOKS = tuple(name for name in nn.Module().__dict__ if "_hook" in name)


def with_hooks(old: nn.Module, new: Module) -> Module:
    """Give a module the hooks of another. Both hold the same dicts, so that handles still remove the hooks."""
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]
    return new


def copy_without_hooks(module: Module) -> Module:
    """A deep copy without users' hooks and the objects that these refer to.

    PyTorch's own hooks (weight norm) are kept: the forward needs them.
    """
    hooks = [table for m in module.modules() for name in HOOKS if isinstance(table := m.__dict__.get(name), dict)]
    return copy.deepcopy(module, {id(table): _torch_hooks(table) for table in hooks})


def _torch_hooks(hooks: dict[int, Any]) -> dict[int, Any]:
    """The hooks that PyTorch registered, and flags, in a table of the same type."""
    sources = {key: str(getattr(hook, "__module__", "")).partition(".")[0] for key, hook in hooks.items()}
    return type(hooks)({k: hook for k, hook in hooks.items() if isinstance(hook, bool) or sources[k] == "torch"})
