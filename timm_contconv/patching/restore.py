"""From layers of this package back to plain convolutions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from ..layers import ConvReplacement
from ..layers.core.arguments import check_module
from ..layers.core.plain import PlainConv, without_zero_borders
from .copies import copy_without_hooks, with_hooks
from .folding import fold_methods
from .record import MERGED, MergedRecord, PatchRecord, get_record, remove_record, require_record
from .transaction import Transaction

__all__ = ["merge", "original_architecture", "outermost_layers", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)

#: pixels along the last axis from which PyTorch's depthwise convolution on the CPU is slow unless channels-last
WIDE = 11


def merge(model: Model, inplace: bool = False, dense: bool = False) -> Model:
    """Turn every layer of this package into plain convolutions with the same output.

    Borders of zeros are cut off their kernels. On the CPU the weights of depthwise kernels of 11 or more columns are
    laid out channels-last, where PyTorch's convolution is many times faster; `state_dict` and files do not keep that,
    so call `model.to(memory_format=torch.channels_last)` after loading.

    Args:
        model: a patched model, or any model that holds layers of this package.
        inplace: change `model` itself instead of a copy.
        dense: give one convolution for each layer, even if several with smaller kernels do the same with less work.
            The output may then differ at the borders of images; see the layer's `to_dense_conv`.

    Returns:
        The model without layers of this package.

    Raises:
        ValueError: the model holds no such layer, or holds one that equals no plain convolution, such as a CC layer
            of scale 0.7; nothing is changed then.
    """
    check_module(model)
    if not any(isinstance(module, ConvReplacement) for module in model.modules()):
        raise ValueError(f"model: this {type(model).__name__} holds no layer of timm_contconv: nothing to merge")
    if isinstance(model, ConvReplacement):
        raise ValueError(f"model: a lone {type(model).__name__} can't be merged in place; call its to_conv()")
    if not inplace:
        model = copy.deepcopy(model)
    layers = outermost_layers(model)
    plain = {}
    for name, layer in layers.items():
        with _named(name):
            plain[name] = _made_lean(layer.to_dense_conv() if dense else layer.to_conv())
    changes = Transaction()
    changes.replace(model, {id(layer): with_hooks(layer, plain[name]) for name, layer in layers.items()})
    for module in model.modules():
        if (record := get_record(module)) is not None:
            changes.set(module, MERGED, MergedRecord(record.spec, tuple(record.replaced), record.architecture))
        remove_record(module, changes)
    changes.apply()
    return model


def _made_lean(merged: nn.Module) -> nn.Module:
    """The same module without what would slow it down: zero borders, and on the CPU the wrong memory format."""
    if isinstance(merged, PlainConv):
        conv = without_zero_borders(merged)
        depthwise = conv.weight.ndim == 4 and conv.groups == conv.in_channels > 1
        if depthwise and conv.kernel_size[-1] >= WIDE and conv.weight.device.type == "cpu":
            conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
        return conv
    for name, child in merged.named_children():
        setattr(merged, name, _made_lean(child))
    return merged


def unpatch(model: Model) -> Model:
    """Restore the original architecture of a patched model, in place.

    Each convolution gets the dense kernel, cropped to the original size.

    Returns:
        The model.

    Raises:
        ValueError: the model is not patched, its layers were exchanged since, or a dense kernel reaches beyond the
            original size; the message names the layers, and the model is not changed.
    """
    record = require_record(model)
    restored: dict[str, nn.Module] = {}
    too_large: list[str] = []
    for name, original in record.replaced.items():
        layer = cast(ConvReplacement, model.get_submodule(name))
        with _named(name):
            conv = layer.to_conv_like(original)
        if conv is None:
            too_large.append(f"{name} ({layer.receptive_field()} into {original.kernel_size})")
        else:
            restored[name] = with_hooks(layer, conv)
    if too_large:
        raise ValueError(
            f"these dense kernels reach beyond the original size: {', '.join(too_large)}; tcc.merge(model) keeps their"
            " full size. To go back to the model before its patch, keep a copy.deepcopy of it"
        )
    _take_back(model, record, restored)
    return model


def original_architecture(model: nn.Module) -> nn.Module:
    """The model before its patch: a copy on the meta device, without weights and users' hooks.

    Raises:
        ValueError: the model is not patched, or its layers were exchanged since.
    """
    record = require_record(model)
    shadow = copy_without_hooks(model).to("meta")
    _take_back(shadow, record, {name: copy.deepcopy(conv) for name, conv in record.replaced.items()})
    return shadow


def _take_back(model: nn.Module, record: PatchRecord, convs: Mapping[str, nn.Module]) -> None:
    """Replace the named layers by convolutions, and undo all other changes of the patch."""
    changes = Transaction()
    changes.replace(model, {id(model.get_submodule(name)): conv for name, conv in convs.items()})
    for change in reversed(record.rewired):
        owner = convs[change.owner] if change.owner in convs else model.get_submodule(change.owner)
        changes.set(owner, change.attribute, change.before)
    for name in record.unfoldable:
        for method in fold_methods(block := model.get_submodule(name)):
            changes.remove(block, method)
    remove_record(model, changes)
    changes.apply()


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Add the layer's name to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def outermost_layers(model: nn.Module) -> dict[str, ConvReplacement]:
    """Layers of this package by name, without those inside another layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ConvReplacement)}
    parts = {id(part) for layer in layers.values() for part in layer.modules() if part is not layer}
    return {name: layer for name, layer in layers.items() if id(layer) not in parts}
