"""What each recipe does to one model: what its outputs keep, and what it costs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import patching

Key = TypeVar("Key", bound=Hashable)

__all__ = ["Comparison", "compare_recipes"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model after a recipe, against the model before.

    Attributes:
        recipe: its name.
        model: the patched model, in eval mode.
        layers: number of convolutions that were replaced.
        top1_kept: share of the images whose top-1 is the same, 0 to 1.
        difference: largest difference of the logits, relative to the largest logit.
        parameters, multiply_adds: relative to the model before; the latter None if they could not be counted.
        patched_time, merged_time: of a forward pass, relative to the model before.
    """

    recipe: str
    model: nn.Module
    layers: int
    top1_kept: float
    difference: float
    parameters: float
    multiply_adds: float | None
    patched_time: float
    merged_time: float


@torch.no_grad()
def compare_recipes(
    model: nn.Module,
    images: Tensor,
    recipes: Sequence[str],
    rounds: int = 5,
    advance: Callable[[str], object] = lambda recipe: None,
) -> list[Comparison]:
    """Patch copies of a model that has learned something, and compare.

    Args:
        model: in eval mode; it is not changed.
        images: (N, C, H, W); the first eight are timed.
        recipes: names of recipes.
        rounds: of timing, in which all models take turns.
        advance: called with the recipe when a copy was patched, for a progress bar.
    """
    patched, reports, merged = {}, {}, {}
    for recipe in recipes:
        patched[recipe] = patching.patch(copy.deepcopy(model), recipe).eval()
        reports[recipe] = patching.report(patched[recipe])
        merged[recipe] = patching.merge(patched[recipe])
        advance(recipe)
    few = images[:8]
    contenders = {("plain", ""): model}
    contenders |= {("patched", recipe): net for recipe, net in patched.items()}
    contenders |= {("merged", recipe): net for recipe, net in merged.items()}
    times = _times_in_turns({key: functools.partial(net, few) for key, net in contenders.items()}, rounds)
    plain = times["plain", ""]
    before = _logits(model, images)
    comparisons = []
    for recipe in recipes:
        after, report = _logits(patched[recipe], images), reports[recipe]
        multiply_adds = None
        if report.multiply_adds_before and report.multiply_adds_after:
            multiply_adds = report.multiply_adds_after / report.multiply_adds_before
        comparisons.append(
            Comparison(
                recipe,
                patched[recipe],
                sum(1 for row in report.rows if row.multiply_adds_after is not None),
                (before.argmax(1) == after.argmax(1)).double().mean().item(),
                ((before - after).abs().max() / before.abs().max()).item(),
                report.parameters_after / report.parameters_before,
                multiply_adds,
                times["patched", recipe] / plain,
                times["merged", recipe] / plain,
            )
        )
    return comparisons


def _times_in_turns(calls: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Median seconds of each call, after one call that is not counted; all take turns in every round."""
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(16)])
