"""Penalties before an optimiser step, constraints after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement
from ..layers.core.arguments import check_module
from ..layers.flex import crop_alike_
from .distributed import edit_whole_parameters, whole_parameters

__all__ = ["constrain_", "constrain_layers_", "mean_penalty", "penalty"]


def penalty(model: nn.Module) -> Tensor:
    """The methods' regularisers, a scalar to add to the loss with a factor of your choice.

    DCLS: how close the elements of a kernel are to each other, from 0 to 1; the released training code adds its square
    from epoch 20 on. FlexConv: how far a kernel's frequencies exceed the Nyquist frequency of its grid, in squared
    cycles per unit (Romero et al. 2022, Eq. 26); the released code adds 0.1 times the sum over layers. FSDP2 gathers
    the parameters for this.

    Returns:
        The mean over the layers that have a regulariser. DCLS layers that share their positions count as one, as in the
        released training code. If there are none, or their parameters are frozen, it still takes `backward()`, which
        then changes nothing; it is 0 without a regulariser.
    """
    value = mean_penalty(_layers(model))
    return value if value.requires_grad or not torch.is_grad_enabled() else value.detach().requires_grad_()


def constrain_(model: nn.Module) -> None:
    """Clamp the parameters that a method keeps in a range, in place. Call it after each optimiser step.

    Under DDP every process clamps equal parameters. Under FSDP2 they are gathered, clamped and sharded again.
    """
    constrain_layers_(_layers(model))


def mean_penalty(layers: Sequence[ConvReplacement]) -> Tensor:
    """`penalty` of these layers."""
    layers = _penalised_once(layers)
    with whole_parameters(layers):
        penalties = [value for layer in layers if (value := layer.penalty()) is not None]
    return torch.stack(penalties).mean() if penalties else torch.zeros(())


def constrain_layers_(layers: Sequence[ConvReplacement]) -> None:
    """`constrain_` for these layers."""
    with edit_whole_parameters(layers):
        for layer in layers:
            layer.constrain_()
        crop_alike_(layers)


def _penalised_once(layers: Sequence[ConvReplacement]) -> list[ConvReplacement]:
    """The layers without those whose penalty is that of an earlier layer, because they share what it depends on."""
    by_source: dict[int, ConvReplacement] = {}
    for layer in layers:
        owner = layer.geometry_owner
        by_source.setdefault(id(owner.geometry_home if owner.penalises_geometry else layer), layer)
    return list(by_source.values())


def _layers(model: nn.Module) -> list[ConvReplacement]:
    check_module(model)
    return [module for module in model.modules() if isinstance(module, ConvReplacement)]
