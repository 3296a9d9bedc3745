"""Constraints and penalties at every optimiser step of a script that knows of neither."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..layers import ConvReplacement
from ..layers.core.replacement import live_layers
from .constraints import constrain_layers_, mean_penalty
from .factory import scale_positions

__all__ = ["StepHooks", "training_hooks"]

_IN_FORCE = threading.Lock()


@contextlib.contextmanager
def training_hooks(
    position_lr_scale: float | None = None, penalty_factor: float = 0.0, penalty_power: int = 1
) -> Iterator[None]:
    """At every optimiser step within, constrain the layers, and penalise them if asked for (`StepHooks`).

    Args:
        position_lr_scale: learning rate of positions, widths, radii and masks relative to that of the weights, for
            optimisers made by `timm.optim.create_optimizer_v2`; None leaves it to timm, which knows of none.
        penalty_factor, penalty_power: what is added to a loss is factor * tcc.penalty(model) ** power.

    Raises:
        ValueError: an argument is out of range, or a power is given without a factor.
        RuntimeError: such a block is in force already.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_the_only_block())
        # Layer decay alone needs the factory's groups too: timm does not see which layers share geometry.
        stack.callback(scale_positions(1.0 if position_lr_scale is None else position_lr_scale))
        hooks = StepHooks(penalty_factor, penalty_power, position_lr_scale)
        stack.callback(hooks.remove)
        yield
    _warn_if_unused(hooks)


@contextlib.contextmanager
def _the_only_block() -> Iterator[None]:
    if not _IN_FORCE.acquire(blocking=False):
        raise RuntimeError(
            "training_hooks: its hooks are in force already, by another training_hooks or by contconv run, and a second"
            " time would penalise twice; leave this one out, and give its arguments to the other"
        )
    try:
        yield
    finally:
        _IN_FORCE.release()


class StepHooks:
    """Hooks on every optimiser of this process, from now until `remove()`.

    They touch the layers of which the optimiser steps a parameter, and no others: not those of an EMA copy or of a
    teacher. After a step the layers are constrained. Ahead of it, the gradient of the penalty is added to the
    parameters' gradients, at full precision, whatever the script did to its loss:

    - once a step, also where gradients are accumulated over several batches, and where one optimiser steps inside of
      another's step, as in ZeroRedundancyOptimizer;
    - after `GradScaler` has taken its scale off, or multiplied by it where a fused optimiser does that itself;
    - after the processes of a job have averaged their gradients: each adds the same, so their parameters stay equal;
    - after gradient clipping, which is about the loss of the script alone.

    A step that `GradScaler` skips adds and constrains nothing.

    Args:
        penalty_factor: on `tcc.penalty` of the layers that are stepped; 0 for none.
        penalty_power: the power of it that is added: 2 is what the released DCLS training code adds.
        position_lr_scale: what `scale_positions` put into timm's factory; each optimiser is checked to have it.

    Raises:
        ValueError: an argument is out of range, or a power is given without a factor.
    """

    def __init__(
        self, penalty_factor: float = 0.0, penalty_power: int = 1, position_lr_scale: float | None = None
    ) -> None:
        if not penalty_factor >= 0:
            raise ValueError(f"penalty_factor={penalty_factor}: expected at least 0")
        if not isinstance(penalty_power, int) or penalty_power < 1:
            raise ValueError(f"penalty_power={penalty_power!r}: expected an int of at least 1")
        if penalty_power != 1 and not penalty_factor:
            raise ValueError(
                f"penalty_power={penalty_power}: expected 1 with penalty_factor=0, which adds no penalty; give a factor"
                " (contconv run: --penalty), or leave the power out (--penalty-power)"
            )
        self.penalty_factor = penalty_factor
        self.penalty_power = penalty_power
        self.position_lr_scale = position_lr_scale
        #: whether an optimiser has stepped layers, and whether these had a penalty
        self.stepped = self.penalised = False
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles = (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if _is_inside_another_step():
            return  # the hook of the outer step has done it, with all of the parameters
        layers = stepped_layers(optimizer)
        if not layers:
            return
        self.stepped = True
        asked = self.position_lr_scale is not None
        if asked and optimizer not in self._checked and _require_position_groups(optimizer, layers):
            self._checked.add(optimizer)
        if self.penalty_factor:
            if any(argument is not None for argument in (*args[1:], *kwargs.values())):
                raise ValueError(
                    f"--penalty: {type(optimizer).__name__}.step was given a closure, which computes gradients inside"
                    " of the step; add tcc.penalty(model) to the loss in the closure instead"
                )
            self.penalised |= add_penalty_gradient(optimizer, layers, self.penalty_factor, self.penalty_power)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        constrain_layers_(stepped_layers(optimizer))


def _is_inside_another_step() -> bool:
    """Whether the optimiser step whose hook calls this runs inside of another one.

    It is read off the stack, where a step that raised is no longer: a note of what was begun would outlive it.
    """
    step = sys._getframe(2)  # PyTorch's wrapper around every optimiser's step, which calls the hooks
    outer = step.f_back
    while outer is not None and outer.f_code is not step.f_code:
        outer = outer.f_back
    return outer is not None


def _warn_if_unused(hooks: StepHooks) -> None:
    """Say what was asked for and did nothing."""
    if hooks.position_lr_scale is not None and not hooks.stepped:
        warnings.warn("--position-lr-scale: had no effect, no optimiser stepped a layer of this package", stacklevel=4)
    if hooks.penalty_factor and not hooks.penalised:
        warnings.warn("--penalty: had no effect, no optimiser stepped a layer whose method has one", stacklevel=4)


def stepped_layers(optimizer: Optimizer) -> list[ConvReplacement]:
    """The layers of which the optimiser steps a parameter, in the same order on every process."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        layer
        for layer in live_layers()
        if any(id(parameter) in stepped for parameter in (*layer.parameters(), *layer.geometry.values()))
    ]


def add_penalty_gradient(optimizer: Optimizer, layers: Sequence[ConvReplacement], factor: float, power: int) -> bool:
    """Add the gradient of factor * (mean penalty of the layers) ** power to those of the optimiser's parameters.

    Returns:
        False where there is no such gradient: no layer has a penalty, or its parameters are frozen.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    with torch.enable_grad():
        value = factor * mean_penalty(layers) ** power
    if not value.requires_grad:
        return False
    scale = getattr(optimizer, "grad_scale", None)  # GradScaler leaves it on an optimiser that unscales for itself
    for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
        if gradient is None:
            continue
        if scale is not None:
            gradient = gradient * scale
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return True


def _require_position_groups(optimizer: Optimizer, layers: Sequence[ConvReplacement]) -> bool:
    """Check that the geometry's learning rate is scaled; False where rates of 0 can't tell yet.

    Raises:
        ValueError: it is not.
    """
    geometry = {id(parameter) for layer in layers for parameter in layer.geometry.values()}
    for group in optimizer.param_groups:
        inside = [id(parameter) in geometry for parameter in group["params"]]
        if any(inside) and not (all(inside) and "lr_scale" in group):
            raise ValueError(
                f"--position-lr-scale: this {type(optimizer).__name__} was not made by timm.optim.create_optimizer_v2"
                " or from its parameter groups; give it tcc.param_groups(model, lr, weight_decay, position_lr_scale=…)"
            )
    rates = [float(group["lr"]) / group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    if max(rates) > (1 + 1e-6) * min(rates):
        raise ValueError(
            "--position-lr-scale: the learning rates of this optimiser's groups are not one rate times their"
            " lr_scale; a scheduler of timm makes them so (train.py: --sched cosine or another)"
        )
    return max(rates) > 0
