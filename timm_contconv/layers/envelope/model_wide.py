"""The Gaussian envelopes of a model: their widths, and smaller filters."""

from __future__ import annotations

from torch import nn

from .layer import GaussianEnvelopeConv2d

__all__ = ["shrink_envelopes", "sigma_per_layer"]


def shrink_envelopes(model: nn.Module, size: int) -> nn.Module:
    """Use another k_g outside training in all layers of a model, in place, with the same sigma (Table 1e).

    A saved model is rebuilt with its recipe's sizes. To keep the smaller one, set `inference_size` in the recipe.

    Args:
        model: a model that holds `GaussianEnvelopeConv2d` layers.
        size: odd, from 3 to the layers' envelope_size; the latter undoes it.

    Returns:
        The model.

    Raises:
        ValueError: the model holds no such layer, or size is out of range; then nothing is changed.
    """
    layers = list(_envelopes(model).values())
    min(layers, key=lambda layer: layer.spec.envelope_size).shrink(size)  # raises before anything else is changed
    for layer in layers:
        layer.shrink(size)
    return model


def sigma_per_layer(model: nn.Module) -> dict[str, dict[str, float]]:
    """Smallest, mean and largest sigma of each layer and their standard deviation, in pixels, for a training log.

    Returns:
        {module name: {"min": …, "mean": …, "max": …, "std": …}}.

    Raises:
        ValueError: the model holds no `GaussianEnvelopeConv2d`.
    """
    sigmas = {name: layer.sigma.detach().double() for name, layer in _envelopes(model).items()}
    return {
        name: {
            "min": sigma.min().item(),
            "mean": sigma.mean().item(),
            "max": sigma.max().item(),
            "std": sigma.std(correction=0).item(),
        }
        for name, sigma in sigmas.items()
    }


def _envelopes(model: nn.Module) -> dict[str, GaussianEnvelopeConv2d]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, GaussianEnvelopeConv2d)}
    if not found:
        raise ValueError(f"model: this {type(model).__name__} holds no GaussianEnvelopeConv2d; tcc.patch puts them in")
    return found
