"""Models for tests whose outputs depend on every one of their layers, and what a verb may not change of them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_contconv.layers import ConvReplacement

__all__ = ["Snapshot", "awake", "create", "geometry_of", "layers_of", "output", "relative", "scatter"]


def create(name: str, **options: Any) -> nn.Module:
    """A timm model with 10 classes, awake, in eval mode."""
    return awake(timm.create_model(name, **{"num_classes": 10, **options})).eval()


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
        for name, parameter in layer.geometry.items():
            if name == "position":
                parameter.uniform_(-(min(layer.kernel_size) // 2), min(layer.kernel_size) // 2)
            elif name == "coordinate":
                parameter.uniform_(-1, 1)
            elif layer.method == "genv":
                parameter.uniform_(0.5, 1.5)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    """The model's layers of this package."""
    return [module for module in model.modules() if isinstance(module, ConvReplacement)]


def geometry_of(model: nn.Module, name: str) -> list[Tensor]:
    """A geometry parameter of every layer, shared ones repeated."""
    return [layer.geometry[name] for layer in layers_of(model)]


def output(model: nn.Module, images: Tensor) -> Tensor:
    """The tensor that a model returns: the last of a list, the first field of another structure, without gradients."""
    with torch.no_grad():
        return _tensor(model(images))


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list):
        return _tensor(value[-1])
    return _tensor(value[0] if isinstance(value, tuple) else next(v for v in value.values() if v is not None))


def relative(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected||."""
    assert value.shape == expected.shape
    return (torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected)).item()


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
