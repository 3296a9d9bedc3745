"""What timm's optimiser factory asks of a patched model: what is not decayed, and to which layer geometry belongs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..layers import ConvReplacement
from ..layers.core.replacement import undecayed_names
from .plan import PatchPlan

__all__ = ["optimizer_hints"]


def optimizer_hints(
    model: nn.Module, plan: PatchPlan, layers: Mapping[str, ConvReplacement]
) -> dict[str, Callable[..., Any]]:
    """The model's `no_weight_decay` and, if it has one, its `group_matcher`, with the new parameters' names added."""
    hints: dict[str, Callable[..., Any]] = {"no_weight_decay": _without_decay(model, plan, layers)}
    if plan.homes and hasattr(model, "group_matcher"):
        matchers = {coarse: model.group_matcher(coarse=coarse) for coarse in (False, True)}  # type: ignore[operator]
        if all(isinstance(matcher, Mapping) for matcher in matchers.values()):
            hints["group_matcher"] = functools.partial(
                _matcher, {coarse: _with_homes(matcher, plan) for coarse, matcher in matchers.items()}
            )
    return hints


def _without_decay(model: nn.Module, plan: PatchPlan, layers: Mapping[str, ConvReplacement]) -> Callable[[], set[str]]:
    names = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    for name, layer in layers.items():
        names.update(f"{name}.{key}" for key in undecayed_names(layer))
    for group, home in zip(plan.shared_groups, plan.homes, strict=True):
        names.update(f"{'.'.join(home)}.{key}" for key in layers[group[0]].geometry)
    return functools.partial(set, frozenset(names))


def _matcher(matchers: Mapping[bool, Any], coarse: bool = False) -> Any:
    return matchers[coarse]


def _with_homes(matcher: Mapping[str, Any], plan: PatchPlan) -> dict[str, Any]:
    """timm's matcher of names to groups, with shared geometry in the group of the last layer that uses it."""
    found = {key: _patterns(value) for key, value in matcher.items()}
    for group, home in zip(plan.shared_groups, plan.homes, strict=True):
        place = _group_of(f"{group[-1]}.weight", matcher)
        if place is not None:
            found[place[0]].insert(0, (rf"^{re.escape('.'.join(home))}\.", place[1]))
    return found


def _group_of(name: str, matcher: Mapping[str, Any]) -> tuple[str, tuple[Any, ...] | None] | None:
    """The key and the numbers of the group that a matcher puts a parameter in; None if no pattern matches it."""
    for key, value in matcher.items():
        for pattern, suffix in _patterns(value):
            if match := re.match(pattern, name):
                numbers = (*(number for number in match.groups() if number is not None), *(suffix or ()))
                return key, numbers or None
    return None


def _patterns(value: Any) -> list[tuple[str, tuple[Any, ...] | None]]:
    """An entry of a matcher as (pattern, numbers after the pattern's own) pairs."""
    return [(value, None)] if isinstance(value, str) else list(value or ())
