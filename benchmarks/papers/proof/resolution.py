"""Trained networks at another size of pictures than that of their training."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

import timm_contconv as tcc
from timm_contconv.layers import ContinuousConv2d, FlexConv2d

__all__ = ["at_size"]


def at_size(model: nn.Module, source: int, target: int) -> nn.Module | None:
    """A copy of a trained network for pictures of another size; None if it has no layer that can be told.

    FlexConvs sample their kernels anew (`tcc.at_resolution`). Of CC layers, those that see the whole picture change
    their scale, so that all later layers see the sizes that they were trained with.

    Args:
        model: (N, 1, H, W) pictures to logits, in eval mode.
        source, target: sides of the pictures of the training, and of those to come.
    """
    model = copy.deepcopy(model)
    if any(isinstance(module, FlexConv2d) for module in model.modules()):
        with warnings.catch_warnings():  # the plain layers beside them downsample, or are one pixel large
            warnings.filterwarnings("ignore", message=r"\d+ plain convolutions keep their kernels")
            return tcc.at_resolution(model, source, target)
    first = _first_cc_layers(model, source)
    for layer in first:
        layer.scale = tuple(scale * source / target for scale in layer.scale)
    return model if first else None


def _first_cc_layers(model: nn.Module, side: int) -> list[ContinuousConv2d]:
    """The CC layers whose input has as many pixels as the picture."""
    found: list[ContinuousConv2d] = []

    def remember(layer: ContinuousConv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if inputs[0].shape[-1] == side:
            found.append(layer)

    layers = [module for module in model.modules() if isinstance(module, ContinuousConv2d)]
    handles = [layer.register_forward_hook(remember) for layer in layers]
    if layers:
        with torch.no_grad():
            model(torch.zeros(1, 1, side, side))
    for handle in handles:
        handle.remove()
    return found
