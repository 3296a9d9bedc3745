"""Copies of modules without their users' hooks, and hooks that move from one module to another."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["copy_without_hooks", "with_hooks"]

Module = TypeVar("Module", bound=nn.Module)

HOOKS = tuple(name for name in nn.Module().__dict__ if "_hook" in name)


def with_hooks(old: nn.Module, new: Module) -> Module:
    """Let the new module run the old one's hooks: the same dicts, so that handles still remove them."""
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]
    return new


def copy_without_hooks(module: Module) -> Module:
    """A deep copy that runs no hook of the user's, and holds nothing that such a hook refers to.

    Hooks of PyTorch (weight norm) compute what a forward needs: they stay.
    """
    hooks = [table for m in module.modules() for name in HOOKS if isinstance(table := m.__dict__.get(name), dict)]
    return copy.deepcopy(module, {id(table): _without_users(table) for table in hooks})


def _without_users(hooks: dict[int, Any]) -> dict[int, Any]:
    kept = {key: hook for key, hook in hooks.items() if isinstance(hook, bool) or _is_needed(hook)}
    return type(hooks)(kept)


def _is_needed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"
