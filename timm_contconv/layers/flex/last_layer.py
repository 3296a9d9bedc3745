"""Kernel networks other than MAGNets that start near given kernels: their last layer is solved for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .nets import KernelNet

__all__ = ["fit_last_layer_"]

SEED = 0
SMALLEST_SINGULAR_VALUE = 1e-3  # relative; smaller ones are not inverted, because the weights would be huge


@torch.no_grad()
def fit_last_layer_(
    parameters: Mapping[str, Tensor],
    net: KernelNet,
    target: Tensor,
    mask: Tensor,
    coordinates: Sequence[Tensor],
    speed: float,
) -> None:
    """Draw a network with a fixed seed and solve for its last layer, in place; deterministic.

    Args:
        parameters: of the network, by name.
        net: its kind.
        target: (C_out, C_in/groups, *K) kernels.
        mask: (prod(K),), fixed.
        coordinates: D axes (K_d,) of the grid.
        speed: as for `KernelNet`.
    """
    drawn = {name: torch.empty(value.shape, dtype=torch.float64) for name, value in parameters.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        net.reset(drawn, speed, bool(net.by_layer))
    for name, value in drawn.items():
        parameters[name].copy_(value)
    hidden = {k: v.detach().double().cpu() for k, v in parameters.items() if not k.startswith("output_")}
    features = net.features(hidden, [axis.double().cpu() for axis in coordinates], speed)
    features = torch.cat((features, torch.ones_like(features[:1]))) * mask.double().cpu()
    wanted = target.detach().double().cpu().flatten(2).flatten(0, 1)
    solution = wanted @ torch.linalg.pinv(features, rtol=SMALLEST_SINGULAR_VALUE)
    parameters["output_weight"].copy_(solution[:, :-1].reshape(parameters["output_weight"].shape))
    parameters["output_bias"].copy_(solution[:, -1].reshape(parameters["output_bias"].shape))
