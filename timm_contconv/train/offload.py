"""What accelerate has to load as a whole when it moves weights to the device just before they are used."""

from __future__ import annotations

from torch import nn

from ..layers import ConvReplacement

__all__ = ["no_split_modules"]


def no_split_modules(model: nn.Module) -> list[str]:
    """Names of the classes whose parameters must be on the device together, as transformers' `_no_split_modules`.

    These are the layers, and the modules that register the geometry that layers share. For accelerate:
    `cpu_offload(model, device, preload_module_classes=tcc.no_split_modules(model))`, and `no_split_module_classes` of
    `infer_auto_device_map`.

    Args:
        model: any model.

    Returns:
        Names of classes, sorted; none without layers of this package.
    """
    layers = [module for module in model.modules() if isinstance(module, ConvReplacement)]
    shared = {id(layer.geometry_owner.geometry_home) for layer in layers}
    homes = [module for module in model.modules() if any(id(child) in shared for child in module.children())]
    return sorted({type(module).__name__ for module in (*layers, *homes) if not isinstance(module, nn.ParameterDict)})
