"""Curriculum by smoothing (CBS; Sinha et al. 2020, as in Kobayashi 2023, section 2.4): a fixed sigma that decays."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..layers import GaussianEnvelopeConv2d

__all__ = ["decaying_sigma"]


@contextlib.contextmanager
def decaying_sigma(model: nn.Module, start: float = 1.0, decay: float = 0.9, every: int = 1) -> Iterator[nn.Module]:
    """Give all Gaussian envelopes of a model one width, and let it decay with the steps of its optimiser.

    The width is start · decay^(steps // every) pixels. It is meant for envelopes that do not learn: patch the model
    with `learn_sigma=False`, and `order="after"` as in CBS.

    Args:
        model: a model that holds `GaussianEnvelopeConv2d` layers.
        start: width at the first step, in pixels, more than 0.
        decay: factor, more than 0 and at most 1. CBS: 0.9.
        every: steps of the optimiser between two factors, at least 1. CBS: five epochs.

    Yields:
        The model. At the end of the block the widths stay as they are.

    Raises:
        ValueError: an argument is out of range; or the model holds no envelope, or one that learns its sigma.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start={start!r}: expected a finite number of more than 0, in pixels")
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay!r}: expected more than 0 and at most 1")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}: expected an int of at least 1")
    layers = _fixed_envelopes(model)
    own = {id(parameter) for parameter in model.parameters()}
    steps = 0

    def set_widths() -> None:
        for layer in layers:
            layer.set_sigma_(start * decay ** (steps // every))

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal steps
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            steps += 1
            set_widths()

    set_widths()
    handle = register_optimizer_step_post_hook(after_step)
    try:
        yield model
    finally:
        handle.remove()


def _fixed_envelopes(model: nn.Module) -> list[GaussianEnvelopeConv2d]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, GaussianEnvelopeConv2d)}
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} holds no Gaussian envelope; tcc.patch(model, 'genv') adds them"
        )
    learning = [name for name, layer in layers.items() if layer.geometry["raw_sigma"].requires_grad]
    if learning:
        raise ValueError(
            f"model: {', '.join(learning[:5])}: sigma is learned there; expected learn_sigma=False, as in"
            " tcc.patch(model, 'genv', learn_sigma=False)"
        )
    return list(layers.values())
