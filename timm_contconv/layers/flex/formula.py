"""A FlexConv kernel as a function of its parameters (Romero et al. 2022): a kernel network times a Gaussian mask."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.subnormals import bell
from .nets import NETS

__all__ = ["SMALLEST_SIGMA", "flex_kernel", "gaussian_mask", "with_constant"]

SMALLEST_SIGMA = 1e-4  # narrower masks are taken as this wide, so that nothing is divided by zero


def gaussian_mask(
    mean: Tensor, sigma: Tensor, coordinates: Sequence[Tensor], threshold: float, angle: Tensor | None = None
) -> Tensor:
    """The anisotropic Gaussian mask on a grid (Romero et al. 2022, Eq. 1), zero where an axis is below the threshold.

    Args:
        mean, sigma: (D,).
        coordinates: D tensors (K_d,), the axes of the grid.
        threshold: 0.1 in the paper (Fig. 7); 0 for none.
        angle: (1,), in two dimensions: the mask's axes are turned by it, in radians from the rows' axis to the
            columns' (appendix D.3); None for none.

    Returns:
        (prod(K),).
    """
    offsets = [axis - mean[d] for d, axis in enumerate(coordinates)]
    if len(offsets) == 2:
        offsets[0] = offsets[0][:, None]  # broadcasts with the columns to the grid
    if angle is not None:
        rows, columns = offsets
        cosine, sine = angle.cos(), angle.sin()
        offsets = [cosine * rows + sine * columns, cosine * columns - sine * rows]
    factors = [_axis_mask(offset, sigma[d], threshold) for d, offset in enumerate(offsets)]
    return functools.reduce(torch.mul, factors).flatten()


def _axis_mask(offset: Tensor, sigma: Tensor, threshold: float) -> Tensor:
    factor = bell(-0.5 * (offset / sigma.abs().clamp(min=SMALLEST_SIGMA)).square())
    return torch.where(factor >= threshold, factor, 0)


def flex_kernel(
    output_weight: Tensor,
    output_bias: Tensor,
    mask_mean: Tensor | None = None,
    mask_sigma: Tensor | None = None,
    mask_angle: Tensor | None = None,
    net: str = "magnet",
    speed: float = 1.0,
    threshold: float = 0.0,
    scale: float = 1.0,
    **inputs: Tensor,
) -> Tensor:
    """Dense FlexConv kernel: network times mask (Romero et al. 2022, Eq. 1-8), times a factor (Eq. 9).

    The mask multiplies the hidden channels instead of the kernel, because they are fewer.

    Args:
        output_weight: (C_out, C_in/groups, H).
        output_bias: (C_out, C_in/groups).
        mask_mean, mask_sigma: (D,), or None for no mask (CKConv).
        mask_angle: see `gaussian_mask`.
        net: name of the kernel network.
        speed: omega of a SIREN; the others have it in their parameters.
        threshold: see `gaussian_mask`.
        scale: factor of the kernel.
        **inputs: the parameters of the network's hidden layers by name, and coordinate_0, ...: D tensors (K_d,), the
            axes of the grid.

    Returns:
        (C_out, C_in/groups, *K).
    """
    axes = [inputs.pop(name) for name in sorted(inputs) if name.startswith("coordinate_")]
    features = with_constant(NETS[net].features(inputs, axes, speed))
    if mask_mean is not None and mask_sigma is not None:
        features = features * gaussian_mask(mask_mean, mask_sigma, axes, threshold, mask_angle)
    weights = torch.cat((output_weight.flatten(0, 1), output_bias.reshape(-1, 1)), 1)
    kernel = (weights * scale) @ features
    return kernel.reshape(*output_bias.shape, *(len(axis) for axis in axes))


def with_constant(features: Tensor) -> Tensor:
    """Channels (H, prod(K)) and one of ones, for the bias of a linear layer: (H + 1, prod(K))."""
    return torch.cat((features, torch.ones_like(features[:1])))
