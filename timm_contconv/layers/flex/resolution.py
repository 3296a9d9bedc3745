"""A whole model at another resolution."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from .conv import FlexConv

__all__ = ["at_resolution"]

Model = TypeVar("Model", bound=nn.Module)


def at_resolution(model: Model, source: int, target: int) -> Model:
    """Adapt a model, in place, from the resolution of its training to another (Romero et al. 2022, Eq. 9).

    Every FlexConv samples its kernel at other steps and scales it, see `FlexConv2d.at_resolution`. Other convolutions
    do not change; a warning names those with more than one pixel. Parameters do not change, so a saved model is rebuilt
    for its original resolution.

    Args:
        model: a model that holds `FlexConv1d` or `FlexConv2d` layers.
        source, target: sizes of the images, or lengths of the sequences, before and after the change.

    Returns:
        The model.

    Raises:
        ValueError: the model holds no such layer, or a resolution is not positive; then nothing is changed.
    """
    layers = [module for module in model.modules() if isinstance(module, FlexConv)]
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} holds no FlexConv, the only layer that changes its resolution;"
            " tcc.patch(model, 'flex') adds them, before training"
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
