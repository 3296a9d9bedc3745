"""FlexConvs as these tests make them, and their kernels straight from the equations."""

from collections.abc import Sequence

import numpy as np
import torch

from timm_contconv.layers.flex import FlexConv1d, FlexConv2d

MAGNET = ("sine_weight", "sine_bias", "mean", "gamma", "hidden_weight", "hidden_bias", "output_weight", "output_bias")


def make(**options) -> FlexConv2d:
    return FlexConv2d(8, 8, **{"kernel_size": 15, "groups": 8, "hidden_channels": 6, **options})


def set_mask_(layer, mean: Sequence[float], sigma: Sequence[float]):
    with torch.no_grad():
        layer.kernel.mask_mean.copy_(torch.tensor(mean))
        layer.kernel.mask_sigma.copy_(torch.tensor(sigma))
    return layer


def direct_kernel(
    layer: FlexConv1d | FlexConv2d, crop: bool = True, axes: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Eq. 1-8, one point of the grid at a time, in float64; then the crop of Fig. 7."""
    p = {name: value.detach().double().numpy() for name, value in layer.kernel.named_parameters()}
    if axes is None:
        axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in layer.kernel_size]
    kernel = np.zeros((*p["output_bias"].shape, *layer.kernel_size))

    def gabor(level: int, x: np.ndarray) -> np.ndarray:
        envelope = np.exp(-0.5 * ((p["gamma"][level] * (x - p["mean"][level])) ** 2).sum(1))
        return envelope * np.sin(p["sine_weight"][level] @ x + p["sine_bias"][level])

    for index in np.ndindex(*layer.kernel_size):
        x = np.array([axis[i] for axis, i in zip(axes, index, strict=True)])
        h = gabor(0, x)
        for level in range(1, len(p["sine_bias"])):
            h = (p["hidden_weight"][level - 1] @ h + p["hidden_bias"][level - 1]) * gabor(level, x)
        psi = p["output_weight"] @ h + p["output_bias"]
        if "mask_mean" in p:
            factors = np.exp(-0.5 * ((x - p["mask_mean"]) / p["mask_sigma"]) ** 2)
            psi = psi * factors.prod() if not crop or (factors >= 0.1).all() else 0 * psi
        kernel[(slice(None), slice(None), *index)] = psi
    return kernel
