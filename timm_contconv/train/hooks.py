"""Constraints and penalties at every optimiser step of an unmodified script."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..layers import ConvReplacement
from ..layers.core.replacement import live_layers
from .constraints import constrain_layers_, mean_penalty
from .factory import scale_positions
from .groups import PositionScale

__all__ = ["StepHooks", "training_hooks"]

_IN_FORCE = threading.Lock()


@contextlib.contextmanager
def training_hooks(
    position_lr_scale: PositionScale | None = None, penalty_factor: float = 0.0, penalty_power: int = 1
) -> Iterator[None]:
    """Constrain the layers, and penalise them on request, at every optimiser step inside this block (`StepHooks`).

    Args:
        position_lr_scale: learning rate of positions, widths, radii and masks relative to the weights', for optimisers
            made by `timm.optim.create_optimizer_v2`: a number, or by name as for `tcc.param_groups`, where {} is what
            the papers have. None gives all the same rate.
        penalty_factor, penalty_power: the loss grows by factor * tcc.penalty(model) ** power.

    Raises:
        ValueError: an argument is out of range, or a power is given without a factor.
        RuntimeError: another such block is active.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_the_only_block())
        # Also without position_lr_scale: a wrapper around a patched model does not say what is not decayed.
        stack.enter_context(scale_positions(1.0 if position_lr_scale is None else position_lr_scale))
        hooks = StepHooks(penalty_factor, penalty_power, position_lr_scale)
        stack.callback(hooks.remove)
        yield
    _warn_if_unused(hooks)


@contextlib.contextmanager
def _the_only_block() -> Iterator[None]:
    if not _IN_FORCE.acquire(blocking=False):
        raise RuntimeError(
            "training_hooks: its hooks are in force already, by another training_hooks or by contconv run; a second"
            " block would penalise twice: remove this one, and give its arguments to the other"
        )
    try:
        yield
    finally:
        _IN_FORCE.release()


class StepHooks:
    """Hooks on every optimiser of this process, from now until `remove()`.

    They act only on layers that have a parameter in the optimiser, not on those of an EMA copy or a teacher. After a
    step the layers are constrained. Before it, or after every call of its closure, the penalty's gradient is added to
    the parameters' gradients, at full precision:

    - once per step, also with gradient accumulation, and with an optimiser that steps inside another one
      (ZeroRedundancyOptimizer);
    - after `GradScaler` has removed its scale, or multiplied by the scale if a fused optimiser removes it;
    - after the processes of a job have averaged their gradients: each adds the same, so their parameters stay equal;
    - after gradient clipping, which sees only the loss of the script.

    A step that `GradScaler` skips adds and constrains nothing.

    Args:
        penalty_factor: factor on `tcc.penalty` of the stepped layers; 0 for no penalty.
        penalty_power: power of the penalty; the released DCLS training code uses 2.
        position_lr_scale: what each optimiser must have from `scale_positions`; None checks nothing.

    Raises:
        ValueError: an argument is out of range, or a power is given without a factor.
    """

    def __init__(
        self, penalty_factor: float = 0.0, penalty_power: int = 1, position_lr_scale: PositionScale | None = None
    ) -> None:
        if not penalty_factor >= 0:
            raise ValueError(f"penalty_factor={penalty_factor}: expected at least 0")
        if not isinstance(penalty_power, int) or penalty_power < 1:
            raise ValueError(f"penalty_power={penalty_power!r}: expected an int of at least 1")
        if penalty_power != 1 and not penalty_factor:
            raise ValueError(
                f"penalty_power={penalty_power}: expected 1 with penalty_factor=0, which adds no penalty; give a factor"
                " (contconv run: --penalty), or omit the power (--penalty-power)"
            )
        self.penalty_factor = penalty_factor
        self.penalty_power = penalty_power
        self.position_lr_scale = position_lr_scale
        #: whether an optimiser has stepped layers, and layers with a penalty
        self.stepped = self.penalised = False
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles = (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """PyTorch calls this with the arguments of `step`, and takes those that it returns instead."""
        if _is_inside_another_step():
            return None  # the outer step's hook has done it for all parameters
        layers = stepped_layers(optimizer)
        if not layers:
            return None
        self.stepped = True
        asked = self.position_lr_scale is not None
        if asked and optimizer not in self._checked and _require_position_groups(optimizer, layers):
            self._checked.add(optimizer)
        if not self.penalty_factor:
            return None

        def penalise(closure: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: self._add_penalty(optimizer, layers, closure())

        positional, named = _with_closures(args[1:], kwargs, penalise)
        if positional == args[1:] and named == kwargs:
            self._add_penalty(optimizer, layers)
        return (args[0], *positional), named

    def _add_penalty(self, optimizer: Optimizer, layers: Sequence[ConvReplacement], loss: Any = None) -> Any:
        """Add the penalty's gradient; return the loss of a closure with the penalty, which line searches compare."""
        value = add_penalty_gradient(optimizer, layers, self.penalty_factor, self.penalty_power)
        if value is None:
            return loss
        self.penalised = True
        if isinstance(loss, Tensor):
            return loss + value.to(loss.device)
        return None if loss is None else loss + value.item()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        constrain_layers_(stepped_layers(optimizer))


def _with_closures(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an optimiser's step, with `change` applied to those that are closures."""
    positional = tuple(change(value) if callable(value) else value for value in args)
    return positional, {name: change(value) if callable(value) else value for name, value in kwargs.items()}


def _is_inside_another_step() -> bool:
    """Whether the optimiser step whose hook calls this runs inside another step.

    The call stack tells: a step that raised an error has left it. A flag could stay set.
    """
    step = sys._getframe(2)  # PyTorch's wrapper around every optimiser's step, which calls the hooks
    outer = step.f_back
    while outer is not None and outer.f_code is not step.f_code:
        outer = outer.f_back
    return outer is not None


def _warn_if_unused(hooks: StepHooks) -> None:
    """Warn about options that had no effect."""
    if hooks.position_lr_scale is not None and not hooks.stepped:
        warnings.warn("position_lr_scale: had no effect: no optimiser stepped a layer of this package", stacklevel=4)
    if hooks.penalty_factor and not hooks.penalised:
        warnings.warn("penalty_factor: had no effect: no optimiser stepped a layer with a penalty", stacklevel=4)


def stepped_layers(optimizer: Optimizer) -> list[ConvReplacement]:
    """The layers that have a parameter in the optimiser, in the same order on every process."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        layer
        for layer in live_layers()
        if any(id(parameter) in stepped for parameter in (*layer.parameters(), *layer.geometry.values()))
    ]


def add_penalty_gradient(
    optimizer: Optimizer, layers: Sequence[ConvReplacement], factor: float, power: int
) -> Tensor | None:
    """Add the gradient of factor * (mean penalty of the layers) ** power to the gradients of the parameters.

    Returns:
        The value, detached; None if no layer has a penalty, or its parameters are frozen.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    with torch.enable_grad():
        value = factor * mean_penalty(layers) ** power
    if not value.requires_grad:
        return None
    scale = getattr(optimizer, "grad_scale", None)  # GradScaler sets it on an optimiser that removes the scale
    for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
        if gradient is None:
            continue
        if scale is not None:
            gradient = gradient * scale
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return value.detach()


def _require_position_groups(optimizer: Optimizer, layers: Sequence[ConvReplacement]) -> bool:
    """Check that the geometry's learning rate is scaled; False if all rates are still 0.

    Raises:
        ValueError: it is not scaled.
    """
    geometry = {id(parameter) for layer in layers for parameter in layer.geometry.values()}
    for group in optimizer.param_groups:
        inside = [id(parameter) in geometry for parameter in group["params"]]
        if any(inside) and not (all(inside) and "lr_scale" in group):
            raise ValueError(
                f"position_lr_scale: this {type(optimizer).__name__} was not made by timm.optim.create_optimizer_v2"
                " or from its parameter groups; give it tcc.param_groups(model, lr, weight_decay, position_lr_scale=…)"
            )
    rates = [float(group["lr"]) / group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    if max(rates) > (1 + 1e-6) * min(rates):
        raise ValueError(
            "position_lr_scale: the learning rates of this optimiser's groups are not one rate times their"
            " lr_scale; a scheduler of timm makes them so (train.py: --sched cosine, for example)"
        )
    return max(rates) > 0
