"""What happens around an optimiser step: penalties before, constraints after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement

__all__ = ["constrain_", "penalty"]


def penalty(model: nn.Module) -> Tensor:
    """The methods' regularisers, a scalar to add to the loss with a factor of your choice.

    For DCLS, how close a kernel's elements are to one another (0 to 1, mean over layers); the released training
    code adds its square from epoch 20 on.

    Returns:
        The mean over the layers that have a regulariser; 0 where none has.
    """
    penalties = [layer.penalty() for layer in model.modules() if isinstance(layer, ConvReplacement)]
    present = [value for value in penalties if value is not None]
    return torch.stack(present).mean() if present else torch.zeros(())


def constrain_(model: nn.Module) -> None:
    """Clamp, in place, the parameters that a method keeps in a range. Call it after each optimiser step."""
    for layer in model.modules():
        if isinstance(layer, ConvReplacement):
            layer.constrain_()
