"""Multiplicative anisotropic Gabor networks (Romero et al. 2022, "FlexConv"): functions of controlled frequency.

A MAGNet maps coordinates to channels. It multiplies linear functions of its hidden channels by Gabor filters of the
coordinates, layer after layer. So it is a sum of products of Gabor filters; its frequency follows from its parameters.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import check_counts
from ..core.subnormals import bell

__all__ = [
    "ENVELOPE_CUT",
    "GABOR_PARAMETERS",
    "INPUT_SCALE",
    "MAGNET_PARAMETERS",
    "MAGNet",
    "filter_frequencies",
    "gabor_filters",
    "magnet_features",
    "magnet_shapes",
    "modulated_sines",
    "multiply_filters",
    "reset_filters_",
    "reset_hidden_",
    "sample_gamma",
]

GABOR_PARAMETERS = ("sine_weight", "sine_bias", "mean", "gamma")
MAGNET_PARAMETERS = (*GABOR_PARAMETERS, "hidden_weight", "hidden_bias", "output_weight", "output_bias")
INPUT_SCALE = 25.6  # appendix D.1

GAMMA_CONCENTRATION = 6.0  # alpha of the released code; divided by the layer's number (section 3.2)
ENVELOPE_CUT = 2.0  # sigma_cut of Eq. 21: standard deviations of an envelope's spectrum that count


def gabor_filters(
    sine_weight: Tensor, sine_bias: Tensor, mean: Tensor, gamma: Tensor, coordinates: Sequence[Tensor]
) -> Tensor:
    """Anisotropic Gabor filters on a grid (Romero et al. 2022, Eq. 7).

    Args:
        sine_weight: (F, D) radians per unit of the coordinates.
        sine_bias: (F,) radians.
        mean: (F, D) centres of the envelopes.
        gamma: (F, D) inverse widths of the envelopes.
        coordinates: D (1 or 2) tensors (K_d,), the axes of the grid.

    Returns:
        (F, *K) filters.
    """
    distances = [gamma[:, d, None] * (axis - mean[:, d, None]) for d, axis in enumerate(coordinates)]
    envelope = [bell(-0.5 * distance.square()) for distance in distances]
    return modulated_sines(sine_weight, sine_bias, envelope, coordinates)


def modulated_sines(
    sine_weight: Tensor, sine_bias: Tensor, envelope: Sequence[Tensor | float], coordinates: Sequence[Tensor]
) -> Tensor:
    """Sines on a grid, times an envelope that is a product over axes.

    The sine of a sum of two phases is a sum of two products. So a two-dimensional grid needs one matrix product of
    one-dimensional factors.

    Args:
        sine_weight, sine_bias, coordinates: as for `gabor_filters`.
        envelope: D factors, (F, K_d) or a number each.

    Returns:
        (F, *K).
    """
    phase = [sine_weight[:, d, None] * axis for d, axis in enumerate(coordinates)]
    phase[0] = phase[0] + sine_bias[:, None]
    if len(coordinates) == 1:
        return envelope[0] * phase[0].sin()
    rows = torch.stack((envelope[0] * phase[0].sin(), envelope[0] * phase[0].cos()), -1)
    columns = torch.stack((envelope[1] * phase[1].cos(), envelope[1] * phase[1].sin()), 1)
    return torch.bmm(rows, columns)


def magnet_features(parameters: Mapping[str, Tensor], coordinates: Sequence[Tensor], speed: float = 1.0) -> Tensor:
    """The hidden channels of a MAGNet's last filter (Romero et al. 2022, Eq. 2, 3 and 7).

    Args:
        parameters: by the names and with the shapes of `magnet_shapes`, the output's not needed.
        coordinates: D tensors (K_d,).
        speed: of other networks, see `KernelNet`; without effect.

    Returns:
        (H, prod(K)).
    """
    weight, bias, mean, gamma = (parameters[name].flatten(0, 1) for name in GABOR_PARAMETERS)
    return multiply_filters(gabor_filters(weight, bias, mean, gamma, coordinates), parameters)


def multiply_filters(filters: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The hidden channels of a multiplicative filter network (Romero et al. 2022, Eq. 2 and 3).

    Args:
        filters: (L H, *K), those of a layer beside each other.
        parameters: sine_bias (L, H), and the W and b of Eq. 3: hidden_weight (L - 1, H, H), hidden_bias (L - 1, H).

    Returns:
        (H, prod(K)).
    """
    features, *others = filters.reshape(*parameters["sine_bias"].shape, -1)
    for weight, bias, layer in zip(parameters["hidden_weight"], parameters["hidden_bias"], others, strict=False):
        features = torch.addmm(bias[:, None], weight, features) * layer
    return features


def filter_frequencies(sine_weight: Tensor, gamma: Tensor) -> Tensor:
    """An estimate of the highest frequency of each layer's Gabor filters (Romero et al. 2022, the summands of Eq. 21).

    The signs of `sine_weight` and `gamma` do not change it. As in Eq. 14, only the smaller gamma of an envelope counts,
    so a filter that is much narrower along one axis exceeds the estimate.

    Args:
        sine_weight, gamma: (L, H, D).

    Returns:
        (L,), in cycles per unit of the coordinates. For envelopes of similar width along both axes, their sum bounds
        the MAGNet's frequency, except for the tails of Gaussian spectra beyond two standard deviations.
    """
    radians = sine_weight.abs().amax(-1) + ENVELOPE_CUT * gamma.abs().amin(-1)
    return radians.amax(-1) / (2 * math.pi)


def magnet_shapes(
    ndim: int, hidden_channels: int, hidden_layers: int, outputs: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a MAGNet's parameters by name; the output parameters start with the sizes in `outputs`.

    Raises:
        ValueError: ndim is not 1 or 2.
    """
    if ndim not in (1, 2):
        raise ValueError(f"ndim={ndim!r}: expected 1 or 2 coordinates")
    filters = (hidden_layers + 1, hidden_channels)
    return {
        "sine_weight": (*filters, ndim),
        "sine_bias": filters,
        "mean": (*filters, ndim),
        "gamma": (*filters, ndim),
        "hidden_weight": (hidden_layers, hidden_channels, hidden_channels),
        "hidden_bias": (hidden_layers, hidden_channels),
        "output_weight": (*outputs, hidden_channels),
        "output_bias": tuple(outputs),
    }


@torch.no_grad()
def reset_filters_(parameters: Mapping[str, Tensor], input_scale: float, by_layer: bool = True) -> None:
    """Draw a multiplicative filter network in place, as section 3.2, appendix D.1 and the released code do.

    The speed of sines grows with the inverse width of their envelope: gamma, or sqrt(gamma) in Fathony et al. 2021.

    Args:
        parameters: by the names and with the shapes of `magnet_shapes`; gamma is (L, H) for isotropic envelopes, and a
            network without envelopes has no mean and gamma.
        input_scale: speed of the first filter's sines, times sqrt(filters).
        by_layer: as for `sample_gamma`.
    """
    sine_weight, gamma = parameters["sine_weight"], parameters.get("gamma")
    layers, _, ndim = sine_weight.shape
    if gamma is not None:
        gamma.copy_(sample_gamma(gamma, by_layer))
    sine_weight.uniform_(-1 / math.sqrt(ndim), 1 / math.sqrt(ndim))
    if gamma is not None:
        sine_weight.mul_(gamma if gamma.ndim == 3 else gamma.sqrt()[..., None])
    sine_weight.mul_(input_scale / math.sqrt(layers))
    parameters["sine_bias"].uniform_(-math.pi, math.pi)
    if gamma is not None:
        parameters["mean"].uniform_(-1, 1)
    reset_hidden_(parameters)


def sample_gamma(like: Tensor, by_layer: bool) -> Tensor:
    """Initial gammas, (L, ...): Gamma(6 / l, 1) in layer l (section 3.2), or Gamma(6 / L, 1) in all layers.

    The latter is what Fathony et al. 2021 do.
    """
    if like.is_meta:  # before torch 2.13 there is no such draw there
        return torch.empty_like(like)
    layers = len(like)
    number = torch.arange(1, layers + 1, device=like.device, dtype=torch.float32)
    number = (number if by_layer else torch.full_like(number, layers)).view(-1, *(1,) * (like.ndim - 1))
    concentration = (GAMMA_CONCENTRATION / number).expand(like.shape)
    return torch.distributions.Gamma(concentration, torch.ones_like(concentration), validate_args=False).sample()


def reset_hidden_(parameters: Mapping[str, Tensor]) -> None:
    """Draw the linear layers between the filters and after them, in place, as `nn.Linear` does."""
    bound = 1 / math.sqrt(parameters["hidden_bias"].shape[-1])
    for name in ("hidden_weight", "hidden_bias", "output_weight", "output_bias"):
        parameters[name].uniform_(-bound, bound)


class MAGNet(nn.Module):
    """Multiplicative anisotropic Gabor network (Romero et al. 2022, Eq. 2-4, 7 and 8).

    Args:
        ndim: D, 1 or 2 coordinates.
        out_channels: N.
        hidden_channels: H, 32 in the paper.
        hidden_layers: linear layers between L = hidden_layers + 1 Gabor filters, 3 in the paper.
        input_scale: speed of the initial sines, 25.6 in the paper (appendix D.1).
        device, dtype: of the parameters.

    Parameters:
        sine_weight, mean, gamma: (L, H, D).
        sine_bias: (L, H).
        hidden_weight, hidden_bias: (L - 1, H, H) and (L - 1, H).
        output_weight, output_bias: (N, H) and (N,).

    Raises:
        ValueError: an argument is out of range.
    """

    sine_weight: Tensor
    gamma: Tensor

    def __init__(
        self,
        ndim: int,
        out_channels: int,
        hidden_channels: int = 32,
        hidden_layers: int = 3,
        input_scale: float = INPUT_SCALE,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(out_channels=out_channels, hidden_channels=hidden_channels, hidden_layers=hidden_layers)
        if not isinstance(input_scale, numbers.Real) or not 0 < input_scale < math.inf:
            raise ValueError(f"input_scale={input_scale!r}: expected a positive number; {INPUT_SCALE} in the paper")
        self.ndim: int = ndim
        self.input_scale: float = input_scale
        for name, shape in magnet_shapes(ndim, hidden_channels, hidden_layers, (out_channels,)).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the paper does."""
        reset_filters_(dict(self.named_parameters()), self.input_scale)

    def forward(self, *coordinates: Tensor) -> Tensor:
        """D axes of a grid, (K_d,) each, to (N, *K)."""
        if len(coordinates) != self.ndim:
            raise ValueError(f"{len(coordinates)} coordinates: expected {self.ndim} tensors, one per dimension")
        values = {name: getattr(self, name) for name in MAGNET_PARAMETERS}
        out = torch.addmm(values["output_bias"][:, None], values["output_weight"], magnet_features(values, coordinates))
        return out.reshape(-1, *(len(axis) for axis in coordinates))

    @torch.no_grad()
    def max_frequency(self) -> float:
        """f+ of Eq. 21, in cycles per unit of the coordinates: an estimate, see `filter_frequencies`."""
        return filter_frequencies(self.sine_weight, self.gamma).sum().item()
