"""Kernel networks that start as given kernels, found by linear algebra instead of training.

Of any network the last layer is solved for. The hidden layers of a MAGNet are chosen first; those of others are drawn.

The outputs of a MAGNet with H hidden channels span at most H + 1 dimensions. The best ones are the leading singular
vectors of the kernels. A hidden channel is a Gabor filter times any function in the span of the layer before. For each
channel the fit chooses a vector that lies in that space and in the wanted one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .formula import with_constant
from .magnet import GABOR_PARAMETERS, MAGNET_PARAMETERS, magnet_features, reset_filters_
from .nets import NETS, KernelNet

__all__ = ["fit_net_"]

SEED = 0
SMALLEST_SINGULAR_VALUE = 1e-3  # relative; smaller ones are not inverted, because the weights would be huge
SMALLEST_DIRECTION = 1e-7  # relative; directions with less are noise
MET = 1e-6  # 1 - cosine of two directions that count as equal
FASTEST_SINE = 0.5  # of the initial filters, relative to the Nyquist frequency of the grid


@torch.no_grad()
def fit_net_(
    parameters: Mapping[str, Tensor],
    net: KernelNet,
    speed: float,
    target: Tensor,
    mask: Tensor,
    coordinates: Sequence[Tensor],
    reach: Sequence[float],
    nyquist: float,
) -> None:
    """Let network times mask reproduce kernels, in place, as well as it can; deterministic.

    Args:
        parameters: of the network, by name.
        net: its kind.
        speed: as for `KernelNet`.
        target: (C_out, C_in/groups, *K) kernels.
        mask: (prod(K),), fixed.
        coordinates: D axes (K_d,) of the grid.
        reach: largest coordinate of the kernels, per dimension.
        nyquist: of the grid, in cycles per unit of the coordinates.
    """
    wanted = target.detach().double().cpu().flatten(2).flatten(0, 1)
    mask = mask.double().cpu()
    axes = [axis.double().cpu() for axis in coordinates]
    if net is NETS["magnet"]:
        values = _initial(parameters, reach, nyquist)
        _normalise_(values, axes)
        directions = _leading_directions(wanted, mask, values["hidden_bias"].shape[-1])
        _choose_hidden_channels_(values, directions, mask, axes)
    else:
        values = {name: torch.empty(value.shape, dtype=torch.float64) for name, value in parameters.items()}
        with _fixed_seed():
            net.reset(values, speed, bool(net.by_layer))
    for name, value in values.items():
        parameters[name].copy_(value)
    rounded = {name: value.detach().double().cpu() for name, value in parameters.items() if "output" not in name}
    features = with_constant(net.features(rounded, axes, speed)) * mask
    solution = wanted @ torch.linalg.pinv(features, rtol=SMALLEST_SINGULAR_VALUE)
    parameters["output_weight"].copy_(solution[:, :-1].reshape(parameters["output_weight"].shape))
    parameters["output_bias"].copy_(solution[:, -1].reshape(parameters["output_bias"].shape))


@contextlib.contextmanager
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        yield


def _initial(parameters: Mapping[str, Tensor], reach: Sequence[float], nyquist: float) -> dict[str, Tensor]:
    """Filters drawn with a fixed seed, spread over the kernels, with frequencies below the grid's Nyquist frequency."""
    shapes = {name: (1,) if "output" in name else parameters[name].shape for name in MAGNET_PARAMETERS}
    values = {name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes.items()}
    with _fixed_seed():
        reset_filters_(values, 1.0)
        values["sine_weight"].uniform_(-1, 1).mul_(2 * math.pi * nyquist * FASTEST_SINE)
    values["mean"].mul_(torch.tensor(reach, dtype=torch.float64))
    return {name: value for name, value in values.items() if "output" not in name}


def _normalise_(values: Mapping[str, Tensor], axes: Sequence[Tensor]) -> None:
    """Give the linear functions before the last layer a mean square of 1 on the grid; their products would vanish."""
    for layer in range(len(values["hidden_weight"]) - 1):
        weights = torch.cat((values["hidden_weight"][layer], values["hidden_bias"][layer, :, None]), 1)
        linear = weights @ with_constant(_features(values, axes, slice(layer + 1)))
        size = linear.square().mean(1).sqrt().clamp_min(SMALLEST_SINGULAR_VALUE)
        values["hidden_weight"][layer] /= size[:, None]
        values["hidden_bias"][layer] /= size


def _features(values: Mapping[str, Tensor], axes: Sequence[Tensor], layers: slice) -> Tensor:
    """The channels of a network that has only these filters."""
    return magnet_features({**values, **{name: values[name][layers] for name in GABOR_PARAMETERS}}, axes)


def _leading_directions(wanted: Tensor, mask: Tensor, count: int) -> Tensor:
    """(prod(K), r <= count) orthonormal: the directions of kernels (N, prod(K)) besides the mask itself."""
    pixels = wanted.any(0).nonzero().flatten()
    own, shape = wanted[:, pixels], mask[pixels] / torch.linalg.vector_norm(mask[pixels]).clamp_min(1e-300)
    rest = own - (own @ shape).outer(shape)
    energy, vectors = torch.linalg.eigh(rest.mT @ rest)
    energy, vectors = energy.flip(0)[:count], vectors.flip(1)[:, :count]
    kept = energy > SMALLEST_DIRECTION**2 * energy.max() if energy.numel() else energy > 0
    directions = wanted.new_zeros(wanted.shape[1], int(kept.sum()))
    directions[pixels] = vectors[:, kept]
    return directions


def _choose_hidden_channels_(
    values: Mapping[str, Tensor], directions: Tensor, mask: Tensor, axes: Sequence[Tensor]
) -> None:
    """Set the last hidden layer so that its channels, times the mask, span the directions."""
    before = with_constant(_features(values, axes, slice(-1)))
    filters = _features(values, axes, slice(-1, None))
    missing = torch.eye(directions.shape[1], dtype=directions.dtype)
    for channel in range(min(directions.shape[1], len(filters))):
        space = (mask * filters[channel] * before).mT
        chosen = _meeting(torch.linalg.qr(space).Q, directions, missing)
        weight = torch.linalg.pinv(space, rtol=SMALLEST_SINGULAR_VALUE) @ (directions @ chosen) * math.sqrt(len(mask))
        values["hidden_weight"][-1, channel], values["hidden_bias"][-1, channel] = weight[:-1], weight[-1]
        missing = _without(missing, chosen)


def _meeting(space: Tensor, directions: Tensor, missing: Tensor) -> Tensor:
    """Coordinates of the vector of span(directions) that lies in `space` and has the largest part in `missing`.

    If the two spaces do not intersect, it is the vector nearest to `space`.
    """
    _, cosines, right = torch.linalg.svd(space.mT @ directions, full_matrices=False)
    meets = int((cosines > 1 - MET).sum())
    basis = right[: max(meets, 1)].mT
    left, _, _ = torch.linalg.svd(basis.mT @ missing, full_matrices=False)
    return basis @ left[:, 0]


def _without(basis: Tensor, vector: Tensor) -> Tensor:
    """An orthonormal basis of span(basis) without the direction of a vector."""
    inside = basis.mT @ vector
    left, _, _ = torch.linalg.svd(inside[:, None], full_matrices=True)
    return basis @ left[:, 1:]
