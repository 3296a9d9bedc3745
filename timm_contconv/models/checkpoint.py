"""What the filters of the authors' checkpoints share: reading a file, and checking that it fits a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models import get_model_traits
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..layers import ConvReplacement

__all__ = ["check_kernel_size", "check_keys", "classifier_name", "native_keys", "renamed"]


def native_keys(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    mark: str,
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """A checkpoint of this package, or one of the authors, with the model's keys.

    Args:
        state_dict: the checkpoint.
        model: to be loaded.
        mark: how keys end that only the authors' checkpoints have.
        convert: gives the authors' tensors the model's keys.

    Raises:
        ValueError: as `check_keys`, and what `convert` raises.
    """
    native = unwrap(state_dict)
    if any(key.endswith(mark) for key in native):
        native = convert(native, model)
    return check_keys(native, model)


def unwrap(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, also from {"model": state_dict}; float8 becomes float32."""
    nested = state_dict.get("model")
    if isinstance(nested, Mapping):
        state_dict = nested
    return {k: v.float() if v.dtype == torch.float8_e4m3fn else v for k, v in state_dict.items()}


def renamed(key: str, rules: Sequence[tuple[str, str]]) -> str:
    """A key after the regular expressions and replacements of all rules, in their order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def classifier_name(model: Any) -> str:
    """The name of the model's last linear layer."""
    return "head" if isinstance(model.head, nn.Linear) else "head.fc"


def check_kernel_size(key: str, size: int, layer: Any) -> None:
    """Refuse a checkpoint for another resolution. Its parameters would fit, but give another function."""
    own = layer.kernel_size[0]
    if size not in (0, own):  # 0: never run
        argument = (
            f"img_size={size - 1}, then use tcc.at_resolution" if len(layer.kernel_size) == 2 else f"length={size}"
        )
        raise ValueError(
            f"{key}={size}: the checkpoint's kernels have {size} pixels, the model's {own}; create the model with"
            f" {argument}"
        )


def check_keys(native: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the model's keys and its first convolution adapted to the model's input channels.

    A classifier for another number of classes may have other keys; timm does not load it.

    Raises:
        ValueError: keys are missing or left over; the message names them.
    """
    wanted, adapted = set(model.state_dict()), _adapted_keys(model)
    missing, unexpected = sorted(wanted - set(native) - adapted), sorted(set(native) - wanted - adapted)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: {_listed('missing', missing)};"
            f" {_listed('unexpected', unexpected)}{_hint(model)}"
        )
    return _with_input_channels(native, model)


def _with_input_channels(native: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt a replaced first convolution to the model's input channels; timm adapts only plain ones.

    As in timm, weights are summed for one channel, else repeated and scaled. Geometry is averaged or repeated.
    """
    names = get_model_traits(model).get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        layer = model.get_submodule(name)
        if not isinstance(layer, ConvReplacement):
            continue
        geometry = {id(parameter) for parameter in layer.geometry.values()}
        for key, parameter in layer.named_parameters(name):
            value = native[key]
            if value.ndim == parameter.ndim and value.shape != parameter.shape:
                axis = 0 if value.ndim == 1 else 1
                native[key] = _in_channels(value, axis, parameter.shape[axis], id(parameter) in geometry)
    return native


def _in_channels(value: Tensor, axis: int, new: int, is_geometry: bool) -> Tensor:
    old = value.shape[axis]
    if new == 1:
        summed = value.float().sum(axis, keepdim=True)
        return summed / old if is_geometry else summed
    value = value.float().index_select(axis, torch.arange(new) % old)
    return value if is_geometry else value * (old / new)


def _adapted_keys(model: nn.Module) -> set[str]:
    """Keys of the classifier if timm will not load it, because the model has another number of classes."""
    config = getattr(model, "pretrained_cfg", {})
    classifier = config.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    if getattr(model, "num_classes", None) == config.get("num_classes"):
        return set()
    return {f"{name}.{key}" for name in names for key in ("weight", "bias")}


def _hint(model: nn.Module) -> str:
    """Why a checkpoint of the same architecture may not fit."""
    convs = (module for module in model.modules() if isinstance(module, _ConvNd | ConvReplacement))
    if all(max(conv.dilation) == 1 for conv in convs):
        return ""
    return (
        "; this model is dilated (output_stride): strides became dilations, so methods that replace strided"
        " convolutions (genv, cc) replace fewer; load the weights without output_stride"
    )


def _listed(kind: str, keys: list[str], shown: int = 8) -> str:
    if not keys:
        return f"no {kind} keys"
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return f"{len(keys)} {kind} keys: {', '.join(keys[:shown])}{more}"
