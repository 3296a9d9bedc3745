"""Parameter groups for an optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers import ConvReplacement

__all__ = ["param_groups"]


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups as timm's optimiser factory makes them, with what the methods' papers ask for.

    No weight decay on biases, one-dimensional parameters, what `model.no_weight_decay()` names, and geometry
    parameters (positions, widths, radii, masks). Geometry parameters have the `lr_scale` of their method.

    Args:
        model: any model; each trainable parameter is in exactly one group.
        lr: learning rate of the weights.
        weight_decay: of the parameters that are decayed.

    Returns:
        Groups {"params", "param_names", "lr", "weight_decay", "lr_scale"}. timm's schedulers multiply lr by
        lr_scale; with another scheduler, do so yourself: `for g in groups: g["lr"] *= g.pop("lr_scale")`.
    """
    scales = {
        id(parameter): module.geometry_lr_scale
        for module in model.modules()
        if isinstance(module, ConvReplacement)
        for parameter in module.geometry.values()
    }
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = scales.get(id(parameter), 1.0)
        free = id(parameter) in scales or parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        decay = 0.0 if free else weight_decay
        empty = {"params": [], "param_names": [], "lr": lr, "weight_decay": decay, "lr_scale": scale}
        group = groups.setdefault((decay, scale), empty)
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())
