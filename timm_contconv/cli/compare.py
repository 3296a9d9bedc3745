"""What each recipe does to one model: what its outputs keep, and what it costs."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import patching

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
    patched, merged = [], []
    for recipe in recipes:
        patched.append(patching.patch(copy.deepcopy(model), recipe).eval())
        merged.append(patching.merge(patched[-1]))
        advance(recipe)
    plain, *times = _times_in_turns([model, *patched, *merged], images[:8], rounds)
    before = _logits(model, images)
    comparisons = []
    for i, recipe in enumerate(recipes):
        after, report = _logits(patched[i], images), patching.report(patched[i])
        multiply_adds = None
        if report.multiply_adds_before and report.multiply_adds_after:
            multiply_adds = report.multiply_adds_after / report.multiply_adds_before
        comparisons.append(
            Comparison(
                recipe,
                patched[i],
                sum(1 for row in report.rows if row.multiply_adds_after is not None),
                (before.argmax(1) == after.argmax(1)).double().mean().item(),
                ((before - after).abs().max() / before.abs().max()).item(),
                report.parameters_after / report.parameters_before,
                multiply_adds,
                times[i] / plain,
                times[len(recipes) + i] / plain,
            )
        )
    return comparisons


def _times_in_turns(models: Sequence[nn.Module], images: Tensor, rounds: int) -> list[float]:
    """Median seconds of a forward pass, after one that is not counted; all models take turns in every round."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, values in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(images)
            values.append(time.perf_counter() - start)
    return [statistics.median(values[1:]) for values in seconds]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(16)])
