"""A warning about weight decay where there must be none."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layers.core.replacement import live_layers

__all__ = ["warn_of_decay"]

_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def warn_of_decay() -> None:
    """From now on, warn at the first step of an optimiser that decays geometry. Nothing else is done to it.

    Only the optimiser knows this: a wrapper around a model (Trainer, fastai, a segmentation network) does not pass on
    the model's `no_weight_decay`.
    """
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if torch.compiler.is_compiling() or optimizer in _checked:
        return
    _checked.add(optimizer)
    decayed = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
    found = [(layer, p) for layer in live_layers() for p in layer.undecayed if id(p) in decayed and p.requires_grad]
    if found:
        layers = ", ".join(sorted({type(layer).__name__ for layer, _ in found}))
        warnings.warn(
            f"{type(optimizer).__name__}: weight_decay acts on {len({id(p) for _, p in found})} parameters of {layers}"
            " that must have none (positions, widths, masks and the like): make the optimizer of"
            " tcc.param_groups(model, lr, weight_decay); tcc.report(model).no_weight_decay names the parameters",
            UserWarning,
            stacklevel=4,
        )
