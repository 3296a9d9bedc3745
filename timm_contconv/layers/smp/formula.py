"""The dense SMP kernel as a function of its parameters (Kim and Park 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SMALLEST_RADIUS", "point_basis", "smp_kernel", "smp_sum_kernel"]

SMALLEST_RADIUS = 1e-4  # lower end of the clipping in the released CIFAR and sequence code


def point_basis(coordinate: Tensor, radius: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Influence of every point on every pixel: max(0, g) of Kim and Park 2023, Eq. 2.

    Args:
        coordinate: (P, m, D) points; -1 and 1 are the centres of the first and the last pixel of a dimension.
        radius: (P, m), in the same unit; at least 1e-4, smaller ones are clamped.
        kernel_size: D ints; a dimension of 1 has its pixel at 0.

    Returns:
        (P, m, prod(kernel_size)), from 0 to 1.
    """
    scale = 1 / radius.clamp(min=SMALLEST_RADIUS).unsqueeze(-1)
    first, *others = [
        (_pixels(size, coordinate) - coordinate[..., d].unsqueeze(-1)).abs() * scale
        for d, size in enumerate(kernel_size)
    ]
    height = 1 - first
    for distance in others:
        height = (height.unsqueeze(-1) - distance.unsqueeze(-2)).flatten(-2)
    return height.relu()


def smp_kernel(weight: Tensor, coordinate: Tensor, radius: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Dense SMP kernel: the mean over the neighbours of each pixel (Kim and Park 2023, Eq. 1 and 2).

    Args:
        weight: (C_out, C_in/groups, m) point weights.
        coordinate: (P, m, D) points; P is C_out (points per filter) or 1 (one set for the layer).
        radius: (P, m).
        kernel_size: D ints.

    Returns:
        (C_out, C_in/groups, *kernel_size) kernel; 0 where no point reaches.
    """
    basis = point_basis(coordinate, radius, kernel_size)
    neighbours = (basis > 0).sum(1, keepdim=True).clamp(min=1)
    kernel = _weighted_sum(weight, basis) / neighbours
    return kernel.reshape(weight.shape[:-1] + tuple(kernel_size))


def smp_sum_kernel(weight: Tensor, coordinate: Tensor, radius: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """`smp_kernel` without the division of Eq. 1, as in the released ImageNet models."""
    kernel = _weighted_sum(weight, point_basis(coordinate, radius, kernel_size))
    return kernel.reshape(weight.shape[:-1] + tuple(kernel_size))


def _weighted_sum(weight: Tensor, basis: Tensor) -> Tensor:
    """One matrix product per set of points: (C_out, C_in/groups, m) and (P, m, K) to (P, -1, K)."""
    return torch.bmm(weight.reshape(basis.shape[0], -1, weight.shape[-1]), basis)


def _pixels(size: int, like: Tensor) -> Tensor:
    """`size` pixel centres from -1 to 1."""
    steps = torch.arange(size, device=like.device, dtype=like.dtype)
    return (2 * steps - (size - 1)) / max(size - 1, 1)
