"""A whole model at another resolution."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from .conv import FlexConv

__all__ = ["at_resolution"]

Model = TypeVar("Model", bound=nn.Module)


def at_resolution(model: Model, source: int, target: int) -> Model:
    """Let a model that was trained at one resolution run at another, in place (Romero et al. 2022, Eq. 9).

    Every FlexConv samples its kernel more (or less) densely and scales it, `FlexConv2d.at_resolution`. Other
    convolutions stay as they are; if some see more than a pixel, a warning names them.

    Parameters do not change: a saved model is rebuilt for the resolution that it was created for.

    Args:
        model: a model that holds `FlexConv1d` or `FlexConv2d` layers.
        source, target: sizes of the images, or lengths of the sequences, now and from now on.

    Returns:
        The model.

    Raises:
        ValueError: the model holds no such layer, or a resolution is not positive; then nothing is changed.
    """
    layers = [module for module in model.modules() if isinstance(module, FlexConv)]
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} holds no FlexConv, whose kernels alone can be sampled anew;"
            " tcc.patch(model, 'flex') puts them in, before training"
        )
    for layer in layers:
        layer.at_resolution(source, target)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    fixed = [name for name, m in model.named_modules() if isinstance(m, plain) and max(m.kernel_size) > 1]
    if fixed:
        warnings.warn(
            f"{len(fixed)} plain convolutions keep their kernels at the new resolution: {', '.join(fixed[:5])}"
            + (" and more" if len(fixed) > 5 else ""),
            stacklevel=2,
        )
    return model
