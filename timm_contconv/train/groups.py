"""Parameter groups for an optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..layers import ConvReplacement
from ..layers.core.arguments import check_module

__all__ = ["PositionScale", "check_position_scale", "param_groups", "split_geometry"]

Group = dict[str, Any]
#: learning rate of geometry relative to the weights': of all, or by name; what is not named has its method's own
PositionScale = float | Mapping[str, float]


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    position_lr_scale: PositionScale | None = None,
    apply_lr_scale: bool = False,
) -> list[Group]:
    """Parameter groups as timm's optimiser factory makes them, with the settings of the methods' papers.

    Biases, one-dimensional parameters, the names of `model.no_weight_decay()`, geometry parameters (positions, widths,
    radii, masks) and the filters of a MAGNet have no weight decay. Geometry has its own learning rate.

    Args:
        model: any model; each trainable parameter is in exactly one group. A part of a model must hold the geometry
            that its layers share.
        lr: learning rate of the weights.
        weight_decay: weight decay of all other parameters.
        layer_decay: learning rate of a layer relative to the next layer's, as in `timm.optim`. Shared geometry belongs
            to the last of its layers.
        position_lr_scale: learning rate of the geometry relative to the weights of the same layer: one for all, or by
            name, as {"radius": 0.1}. Parameters without a name in it, and all for None, have their method's own: 5 for
            DCLS, 0.1 for SMP's radii and FlexConv's masks, 1 for others.
        apply_lr_scale: give each group lr times its lr_scale, and no lr_scale. For schedulers that do not know
            timm's lr_scale: those of PyTorch, transformers, Lightning, fastai.

    Returns:
        Groups {"params", "param_names", "lr", "weight_decay", "lr_scale", "use_fallback"}. timm's schedulers multiply
        lr by lr_scale. timm's Muon leaves a group with use_fallback to AdamW: geometry is no matrix.

    Raises:
        ValueError: a number is out of range, or the model's layers train geometry that is registered outside of it.
    """
    _require_rates(lr=lr, weight_decay=weight_decay, layer_decay=1.0 if layer_decay is None else layer_decay)
    scale = {} if position_lr_scale is None else check_position_scale(position_lr_scale)
    _require_geometry(model)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: list[Group] = []
    for group in split_geometry(groups, model, scale):
        factor = group.get("lr_scale", 1.0)
        made.append(
            {
                "params": group["params"],
                "param_names": [names[id(parameter)] for parameter in group["params"]],
                "lr": lr * factor if apply_lr_scale else lr,
                "weight_decay": group["weight_decay"],
                **({} if apply_lr_scale else {"lr_scale": factor}),
                "use_fallback": group.get("use_fallback", False),
            }
        )
    return made


def _require_rates(**rates: float) -> None:
    for name, value in rates.items():
        if not _is_rate(value):
            raise ValueError(f"{name}={value!r}: expected a finite number of at least 0")


def check_position_scale(scale: PositionScale) -> PositionScale:
    """Return the scale, or the scales by name, if all are finite and more than 0; raise a ValueError otherwise."""
    named = scale.items() if isinstance(scale, Mapping) else [(None, scale)]
    for name, value in named:
        if not (_is_rate(value) and value > 0):
            raise ValueError(
                f"position_lr_scale{'' if name is None else f'[{name!r}]'}={value!r}: expected more than 0, and finite;"
                " to freeze positions, call requires_grad_(False)"
            )
    return scale


def _is_rate(value: Any) -> bool:
    """Whether this is a finite number of at least 0."""
    try:
        return bool(0 <= value < math.inf)
    except (RuntimeError, TypeError):  # a string; a tensor with several values
        return False


def _require_geometry(model: nn.Module) -> None:
    """Refuse a part of a model if trainable geometry of its layers is registered outside of it."""
    check_module(model)
    registered = {id(parameter) for parameter in model.parameters()}
    orphans = [
        name or type(layer).__name__
        for name, layer in model.named_modules()
        if isinstance(layer, ConvReplacement)
        and any(p.requires_grad and id(p) not in registered for p in layer.geometry.values())
    ]
    if orphans:
        shown = ", ".join(orphans[:5]) + (f" and {len(orphans) - 5} more" if len(orphans) > 5 else "")
        raise ValueError(
            f"model: {shown}: these layers share geometry that is registered outside of this {type(model).__name__}, so"
            " its parameters() and state_dict() lack it; pass its parent, or freeze the geometry with"
            " requires_grad_(False)"
        )


def split_geometry(groups: Iterable[Group], model: nn.Module, lr_scale: PositionScale) -> list[Group]:
    """Move geometry parameters into separate groups, without weight decay and with their own lr_scale.

    Other parameters that the layers exempt from weight decay are moved too, and keep their lr_scale.

    Args:
        groups: groups of the model's parameters; all keys are kept.
        model: the model.
        lr_scale: factor on the lr_scale of a group: of all geometry, or by name. What is not named has the factor in
            its method's `geometry_lr_scale`.

    Returns:
        New groups; each parameter is in exactly one, as before.

    Raises:
        ValueError: lr_scale names a parameter that no layer of the model has as geometry.
    """
    layers = [module for module in model.modules() if isinstance(module, ConvReplacement)]
    factors = {id(parameter): 1.0 for layer in layers for parameter in layer.undecayed}
    factors |= _geometry_factors(layers, lr_scale)
    split: list[Group] = []
    for group in groups:
        if rest := [parameter for parameter in group["params"] if id(parameter) not in factors]:
            split.append({**group, "params": rest})
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if id(parameter) in factors:
                scale = group.get("lr_scale", 1.0) * factors[id(parameter)]
                by_scale.setdefault(scale, []).append(parameter)
        split += [
            {**group, "params": parameters, "weight_decay": 0.0, "lr_scale": scale, "use_fallback": True}
            for scale, parameters in by_scale.items()
        ]
    return split


def _geometry_factors(layers: Sequence[ConvReplacement], lr_scale: PositionScale) -> dict[int, float]:
    """The factor on the lr_scale of each geometry parameter, by its id."""
    if isinstance(lr_scale, Mapping) and layers:
        known = {name for layer in layers for name in layer.geometry}
        if unknown := sorted(lr_scale.keys() - known):
            raise ValueError(
                f"position_lr_scale[{unknown[0]!r}]: no layer of the model has it; there are {', '.join(sorted(known))}"
            )
    factors = {}
    for layer in layers:
        own = layer.geometry_owner.geometry_lr_scale
        for name, parameter in layer.geometry.items():
            given = lr_scale.get(name) if isinstance(lr_scale, Mapping) else lr_scale
            factors[id(parameter)] = own.get(name, 1.0) if given is None else given
    return factors
