"""Convolution between all channels of a group, by real FFTs.

Spectra are grouped as (groups, frequencies, rows, columns), so that channels meet in matrix products.
"""

from collections.abc import Sequence

from torch import Tensor

from .fft import Axis, axes_of, gradient_spectrum, image_spectrum, inverse, spatial, transform
from .problem import compute_dtype

__all__ = ["input_gradient", "output", "weight_gradient"]


def output(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int) -> Tensor:
    """The convolution of x (N, C_in, *size) with weight (C_out, C_in/groups, *kernel)."""
    axes = axes_of(x.shape[2:], weight.shape[2:], stride, padding)
    images, kernels = _grouped(image_spectrum(x, axes), groups, 1), _grouped(_kernel_spectrum(weight, axes), groups, 0)
    products = images @ kernels.mT.conj_physical()
    wanted = [slice(0, (a.outputs - 1) * a.stride + 1, a.stride) for a in axes]
    return inverse(_ungrouped(products, axes, 1), axes)[spatial(wanted)]


def input_gradient(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """The gradient of `output` with respect to x, (N, C_in, *input_size)."""
    axes = axes_of(input_size, weight.shape[2:], stride, padding)
    kernels = _grouped(_kernel_spectrum(weight, axes), groups, 0)
    products = _grouped(gradient_spectrum(grad, axes), groups, 1) @ kernels
    wanted = [slice(a.left, a.left + a.size) for a in axes]
    return inverse(_ungrouped(products, axes, 1), axes)[spatial(wanted)]


def weight_gradient(
    grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """The gradient of `output` with respect to its weight, (C_out, C_in/groups, *kernel_size)."""
    axes = axes_of(x.shape[2:], kernel_size, stride, padding)
    grads = _grouped(gradient_spectrum(grad, axes), groups, 1).conj_physical()
    products = grads.mT @ _grouped(image_spectrum(x, axes), groups, 1)
    out = x.new_zeros((grad.shape[1], x.shape[1] // groups, *kernel_size))
    taps = inverse(_ungrouped(products, axes, 0), axes)[spatial([slice(0, a.taps) for a in axes])]
    out[spatial([slice(a.first_tap, a.first_tap + a.taps) for a in axes])] = taps.to(x.dtype)
    return out


def _kernel_spectrum(weight: Tensor, axes: list[Axis]) -> Tensor:
    used = weight[spatial([slice(a.first_tap, a.first_tap + a.taps) for a in axes])]
    return transform(used.to(compute_dtype(weight.dtype)), axes)


def _grouped(spectrum: Tensor, groups: int, axis: int) -> Tensor:
    """(A, B, *frequencies) with the groups blocks of `axis` as (groups, frequencies, A, B), A or B per group."""
    return spectrum.flatten(2).unflatten(axis, (groups, -1)).movedim((axis, -1), (0, 1))


def _ungrouped(products: Tensor, axes: list[Axis], axis: int) -> Tensor:
    """The inverse of `_grouped`."""
    frequencies = [*(a.length for a in axes[:-1]), axes[-1].length // 2 + 1]
    return products.movedim((0, 1), (axis, -1)).flatten(axis, axis + 1).unflatten(-1, frequencies)
