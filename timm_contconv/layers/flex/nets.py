"""The networks that can generate a FlexConv's kernel: MAGNets, and what the paper compares them with (Tables 1-3, 5).

All end in a linear layer, so a network is the function of the coordinates that gives the inputs of this layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core.subnormals import bell
from .magnet import (
    GABOR_PARAMETERS,
    INPUT_SCALE,
    filter_frequencies,
    magnet_features,
    magnet_shapes,
    modulated_sines,
    multiply_filters,
    reset_filters_,
    reset_hidden_,
)

__all__ = ["NETS", "KernelNet", "NetName"]

NetName = Literal["magnet", "gabor", "fourier", "siren"]
Parameters = Mapping[str, Tensor]

SIREN_OMEGA = 30.0  # Sitzmann et al. 2020


@dataclasses.dataclass(frozen=True)
class KernelNet:
    """A kind of network.

    Attributes:
        shapes: (D, H, hidden_layers, sizes of the outputs) -> shapes of all parameters, by name; the last are
            output_weight (*outputs, H) and output_bias (*outputs,).
        reset: draws the parameters in place: (parameters, speed, by_layer), see `sample_gamma` for the last.
        features: (hidden parameters, axes of the grid, speed) -> (H, prod(K)).
        frequencies: (parameters) -> (L,): an estimate of the highest frequency of each layer's filters, in cycles per
            unit; None if the network has no highest frequency.
        speed: the default: input_scale of a multiplicative network, omega of a SIREN.
        by_layer: the default; None if the network has no envelopes.
    """

    shapes: Callable[[int, int, int, Sequence[int]], dict[str, tuple[int, ...]]]
    reset: Callable[[Parameters, float, bool], None]
    features: Callable[[Parameters, Sequence[Tensor], float], Tensor]
    frequencies: Callable[[Parameters], Tensor] | None
    speed: float
    by_layer: bool | None


def _magnet_frequencies(parameters: Parameters) -> Tensor:
    return filter_frequencies(parameters["sine_weight"], parameters["gamma"])


# ---- multiplicative Gabor networks: isotropic envelopes (Romero et al. 2022, Eq. 5; Fathony et al. 2021)


def _gabor_shapes(ndim: int, hidden: int, layers: int, outputs: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return {**magnet_shapes(ndim, hidden, layers, outputs), "gamma": (layers + 1, hidden)}


def _gabor_features(parameters: Parameters, coordinates: Sequence[Tensor], speed: float) -> Tensor:
    weight, bias, mean, gamma = (parameters[name].flatten(0, 1) for name in GABOR_PARAMETERS)
    envelope = [bell(-0.5 * gamma[:, None] * (axis - mean[:, d, None]).square()) for d, axis in enumerate(coordinates)]
    return multiply_filters(modulated_sines(weight, bias, envelope, coordinates), parameters)


def _gabor_frequencies(parameters: Parameters) -> Tensor:
    """An envelope exp(-gamma r^2 / 2) has a deviation of 1 / sqrt(gamma), its spectrum one of sqrt(gamma)."""
    return filter_frequencies(parameters["sine_weight"], parameters["gamma"].clamp_min(0).sqrt()[..., None])


# ---- multiplicative Fourier networks: no envelopes (Fathony et al. 2021)


def _fourier_shapes(ndim: int, hidden: int, layers: int, outputs: Sequence[int]) -> dict[str, tuple[int, ...]]:
    shapes = magnet_shapes(ndim, hidden, layers, outputs)
    return {name: shape for name, shape in shapes.items() if name not in ("mean", "gamma")}


def _fourier_features(parameters: Parameters, coordinates: Sequence[Tensor], speed: float) -> Tensor:
    weight, bias = (parameters[name].flatten(0, 1) for name in ("sine_weight", "sine_bias"))
    return multiply_filters(modulated_sines(weight, bias, [1.0] * len(coordinates), coordinates), parameters)


def _fourier_frequencies(parameters: Parameters) -> Tensor:
    return parameters["sine_weight"].abs().amax((-2, -1)) / (2 * math.pi)


# ---- SIREN: an MLP with sines (Sitzmann et al. 2020)


def _siren_shapes(ndim: int, hidden: int, layers: int, outputs: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """hidden_layers linear layers, of which the last is the output's."""
    if layers < 2:
        raise ValueError(f"hidden_layers={layers}: expected at least 2 for a SIREN, whose last layer has no sine")
    return {
        "sine_weight": (hidden, ndim),
        "sine_bias": (hidden,),
        "hidden_weight": (layers - 2, hidden, hidden),
        "hidden_bias": (layers - 2, hidden),
        "output_weight": (*outputs, hidden),
        "output_bias": tuple(outputs),
    }


@torch.no_grad()
def _reset_siren(parameters: Parameters, speed: float, by_layer: bool) -> None:
    hidden, ndim = parameters["sine_weight"].shape
    reset_hidden_(parameters)
    parameters["sine_weight"].uniform_(-1 / ndim, 1 / ndim)
    parameters["sine_bias"].uniform_(-1 / math.sqrt(ndim), 1 / math.sqrt(ndim))
    bound = math.sqrt(6 / hidden) / speed
    for name in ("hidden_weight", "output_weight"):
        parameters[name].uniform_(-bound, bound)


def _siren_features(parameters: Parameters, coordinates: Sequence[Tensor], speed: float) -> Tensor:
    weight = parameters["sine_weight"]
    phase = weight[:, :1] * coordinates[0]
    if len(coordinates) == 2:
        phase = (phase[:, :, None] + (weight[:, 1:] * coordinates[1])[:, None]).flatten(1)
    features = torch.sin(speed * (phase + parameters["sine_bias"][:, None]))
    for weight, bias in zip(parameters["hidden_weight"], parameters["hidden_bias"], strict=True):
        features = torch.sin(speed * torch.addmm(bias[:, None], weight, features))
    return features


#: by name, as in `FlexSpec.kernel_net`
NETS: dict[str, KernelNet] = {
    "magnet": KernelNet(magnet_shapes, reset_filters_, magnet_features, _magnet_frequencies, INPUT_SCALE, True),
    "gabor": KernelNet(_gabor_shapes, reset_filters_, _gabor_features, _gabor_frequencies, INPUT_SCALE, False),
    "fourier": KernelNet(_fourier_shapes, reset_filters_, _fourier_features, _fourier_frequencies, INPUT_SCALE, None),
    "siren": KernelNet(_siren_shapes, _reset_siren, _siren_features, None, SIREN_OMEGA, None),
}
