"""A FlexConv kernel as a function of its parameters (Romero et al. 2022): a MAGNet times a Gaussian mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .magnet import magnet_features

__all__ = ["SMALLEST_SIGMA", "flex_kernel", "gaussian_mask"]

SMALLEST_SIGMA = 1e-4  # narrower masks are taken as this wide, so that nothing is divided by zero


def gaussian_mask(mean: Tensor, sigma: Tensor, coordinates: Sequence[Tensor], threshold: float) -> Tensor:
    """The anisotropic Gaussian mask on a grid (Romero et al. 2022, Eq. 1), zero where an axis is below the threshold.

    Args:
        mean, sigma: (D,).
        coordinates: D tensors (K_d,), the axes of the grid.
        threshold: 0.1 in the paper (Fig. 7); 0 for none.

    Returns:
        (prod(K),).
    """
    mask = torch.ones_like(mean[:1])
    for d, axis in enumerate(coordinates):
        factor = torch.exp(-0.5 * ((axis - mean[d]) / sigma[d].abs().clamp(min=SMALLEST_SIGMA)).square())
        mask = (mask[:, None] * torch.where(factor >= threshold, factor, 0)).flatten()
    return mask


def flex_kernel(
    sine_weight: Tensor,
    sine_bias: Tensor,
    mean: Tensor,
    gamma: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    mask_mean: Tensor | None = None,
    mask_sigma: Tensor | None = None,
    threshold: float = 0.0,
    scale: float = 1.0,
    **coordinates: Tensor,
) -> Tensor:
    """Dense FlexConv kernel: MAGNet times mask (Romero et al. 2022, Eq. 1-8), times a factor (Eq. 9).

    The mask multiplies the hidden channels instead of the kernel, because they are fewer.

    Args:
        sine_weight, ..., hidden_bias: see `magnet_features`.
        output_weight: (C_out, C_in/groups, H).
        output_bias: (C_out, C_in/groups).
        mask_mean, mask_sigma: (D,), or None for no mask (CKConv).
        threshold: see `gaussian_mask`.
        scale: factor of the kernel.
        **coordinates: D tensors (K_d,), the axes of the grid, in the order of their names.

    Returns:
        (C_out, C_in/groups, *K).
    """
    axes = [coordinates[name] for name in sorted(coordinates)]
    features = magnet_features(sine_weight, sine_bias, mean, gamma, hidden_weight, hidden_bias, axes)
    features = torch.cat((features, torch.ones_like(features[:1])))
    if mask_mean is not None and mask_sigma is not None:
        features = features * gaussian_mask(mask_mean, mask_sigma, axes, threshold)
    weights = torch.cat((output_weight.flatten(0, 1), output_bias.reshape(-1, 1)), 1)
    kernel = (weights * scale) @ features
    return kernel.reshape(*output_bias.shape, *(len(axis) for axis in axes))
