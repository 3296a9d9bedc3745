"""Penalties before an optimiser step, constraints after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement
from .distributed import edit_whole_parameters, whole_parameters

__all__ = ["constrain_", "constrain_layers_", "mean_penalty", "penalty"]


def penalty(model: nn.Module) -> Tensor:
    """The methods' regularisers, a scalar to add to the loss with a factor of your choice.

    For DCLS, how close a kernel's elements are to one another (0 to 1); the released training code adds its square
    from epoch 20 on. For FlexConv, by how much a kernel's filters exceed the frequency that its grid can show (Eq. 26
    of its paper), in squared cycles per unit; the released code adds 0.1 times the sum over layers. Under FSDP2 the
    parameters are gathered for it.

    Returns:
        The mean over the layers that have a regulariser; 0 where none has.
    """
    return mean_penalty(_layers(model))


def constrain_(model: nn.Module) -> None:
    """Clamp, in place, the parameters that a method keeps in a range. Call it after each optimiser step.

    Under DDP every process clamps equal parameters; under FSDP2 they are gathered, clamped and cut up again.
    """
    constrain_layers_(_layers(model))


def mean_penalty(layers: Sequence[ConvReplacement]) -> Tensor:
    """`penalty` of these layers."""
    with whole_parameters(layers):
        penalties = [value for layer in layers if (value := layer.penalty()) is not None]
    return torch.stack(penalties).mean() if penalties else torch.zeros(())


def constrain_layers_(layers: Sequence[ConvReplacement]) -> None:
    """`constrain_` for these layers."""
    with edit_whole_parameters(layers):
        for layer in layers:
            layer.constrain_()


def _layers(model: nn.Module) -> list[ConvReplacement]:
    return [module for module in model.modules() if isinstance(module, ConvReplacement)]
