"""Models for tests whose outputs depend on every one of their layers, and what a verb may not change of them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_contconv as tcc
from timm_contconv.hub.skeleton import without_memory
from timm_contconv.layers import ConvReplacement

from .helpers import spread_

__all__ = [
    "REGISTERED",
    "Snapshot",
    "awake",
    "create",
    "first_tensor",
    "geometry_of",
    "layers_of",
    "on_meta",
    "output",
    "scatter",
]

#: the recipes that are registered on some architecture
REGISTERED = [name for name in tcc.list_patches() if tcc.load_patch(name).models]


def create(name: str, **options: Any) -> nn.Module:
    """A timm model with 10 classes, awake, in eval mode."""
    return awake(timm.create_model(name, **{"num_classes": 10, **options})).eval()


def on_meta(name: str, **options: Any) -> nn.Module:
    """A timm model without memory, for its names and sizes."""
    with without_memory():
        return timm.create_model(name, **options)


@torch.no_grad()
def awake(model: nn.Module) -> nn.Module:
    """Random norm statistics, and scales of about 1 where they start so small that they hide the layers before them.

    Such are the layer scales of a fresh ConvNeXt (1e-6) and the last norm of each block of a fresh ResNet (0).
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for name, parameter in model.named_parameters():
        is_scale = parameter.numel() == max(parameter.shape, default=1) and not name.endswith("bias")
        if is_scale and parameter.abs().max() < 0.1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


@torch.no_grad()
def scatter(model: nn.Module) -> nn.Module:
    """Spread the geometry of layers over their whole kernels: a fresh one gathers at the centre."""
    for layer in layers_of(model):
        if layer.method in ("dcls", "smp"):
            spread_(layer)
        elif layer.method == "genv":
            for width in layer.geometry.values():
                width.uniform_(0.5, 1.5)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    """The model's layers of this package."""
    return [module for module in model.modules() if isinstance(module, ConvReplacement)]


def geometry_of(model: nn.Module, name: str) -> list[Tensor]:
    """A geometry parameter of every layer, shared ones repeated."""
    return [layer.geometry[name] for layer in layers_of(model)]


@torch.no_grad()
def output(model: nn.Module, images: Tensor) -> Tensor:
    """The first tensor that a model returns, without gradients."""
    return first_tensor(model(images))


def first_tensor(value: Any) -> Tensor:
    """Of what a model returns: the last feature map of a feature extractor, the first field of another."""
    while not isinstance(value, Tensor):
        if isinstance(value, list):
            value = value[-1]
        else:
            value = value[0] if isinstance(value, tuple) else next(v for v in value.values() if v is not None)
    return value


class Snapshot:
    """Everything of a model that a failed or a pure function must leave as it was.

    Modules by identity and in their order, their attributes, hooks, parameters and buffers by identity, and values.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.attributes = [_attributes(module) for _, module in self.modules]
        self.tensors = {name: value.clone() for name, value in model.state_dict().items()}

    def differences(self) -> list[str]:
        """What is no longer as it was."""
        found = [] if list(self.model.named_modules(remove_duplicate=False)) == self.modules else ["modules"]
        for (name, module), before in zip(self.modules, self.attributes, strict=True):
            now = _attributes(module)
            keys = before.keys() | now.keys()
            found += [f"{name}.{key}" for key in keys if not _same(before.get(key, self), now.get(key, self))]
        state = self.model.state_dict()
        if list(state) != list(self.tensors) or not all(torch.equal(state[k], v) for k, v in self.tensors.items()):
            found.append("state_dict")
        return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; of dicts (modules, parameters, hooks), their items in order."""
    return {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in vars(module).items()}


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, tuple) and isinstance(now, tuple):
        return len(before) == len(now) and all(map(_same, before, now))
    return before is now or (not isinstance(before, Tensor | nn.Module) and type(before) is type(now) and before == now)
