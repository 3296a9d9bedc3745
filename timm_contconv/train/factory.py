"""Learning rates of positions in timm's optimiser factory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import timm.optim
from timm.optim import _optim_factory
from torch import nn

from .groups import PositionScale, check_position_scale, split_geometry

__all__ = ["scale_positions"]

FUNCTIONS = ("param_groups_weight_decay", "param_groups_layer_decay")


@contextlib.contextmanager
def scale_positions(lr_scale: PositionScale) -> Iterator[None]:
    """Inside this block, timm's optimiser factory puts geometry parameters into groups without weight decay.

    The lr_scale of such a group is `lr_scale` times that of the layer's other parameters (1 without layer decay).
    timm's schedulers multiply the learning rate by it.

    Args:
        lr_scale: as `position_lr_scale` of `tcc.param_groups`; {} takes each method's own.

    Raises:
        ValueError: lr_scale is out of range.
    """
    check_position_scale(lr_scale)
    places = [(module, name, getattr(module, name)) for module in (timm.optim, _optim_factory) for name in FUNCTIONS]
    for module, name, function in places:
        setattr(module, name, _with_geometry_split(function, lr_scale))
    try:
        yield
    finally:
        for module, name, function in places:
            setattr(module, name, function)


def _with_geometry_split(function: Callable[..., Any], lr_scale: PositionScale) -> Callable[..., Any]:
    @functools.wraps(function)
    def grouped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return split_geometry(function(model, *args, **kwargs), model, lr_scale)

    return grouped
