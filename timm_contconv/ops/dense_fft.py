"""Convolution between all channels of a group, by real FFTs.

The spectra of kernels are many times as large as kernels, so they exist for a block of channels at a time. They are
laid out as (groups, frequencies, rows, columns), so that channels meet in matrix products.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from .fft import Axis, axes_of, gradient_spectrum, image_spectrum, inverse, spatial, transform
from .problem import compute_dtype, new_tensor

__all__ = ["input_gradient", "output", "weight_gradient"]

# Bytes of the spectra of a block: of its kernels, and of images before or behind them.
_BLOCK_BYTES = 1 << 23


def output(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int) -> Tensor:
    """The convolution of x (N, C_in, *size) with weight (C_out, C_in/groups, *kernel)."""
    axes = axes_of(x.shape[2:], weight.shape[2:], stride, padding)
    out = new_tensor(x, (x.shape[0], weight.shape[0], *(a.outputs for a in axes)))
    images, kernels, outputs = _grouped(x, groups), _kernels(weight, axes, groups), _grouped(out, groups)
    wanted = [slice(0, (a.outputs - 1) * a.stride + 1, a.stride) for a in axes]
    for group, blocks in _blocks(kernels.shape[:2], kernels.shape[2] + x.shape[0], axes):
        spectra = _by_frequency(image_spectrum(images[group], axes), axes)
        for block in blocks:
            filters = _by_frequency(_kernel_spectrum(kernels[group, block], axes), axes)
            outputs[group, :, block] = _values(spectra @ filters.mT.conj_physical(), axes, wanted)
    return out


def input_gradient(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """The gradient of `output` with respect to x, (N, C_in, *input_size)."""
    axes = axes_of(input_size, weight.shape[2:], stride, padding)
    out = new_tensor(grad, (grad.shape[0], weight.shape[1] * groups, *input_size))
    grads, kernels, inputs = _grouped(grad, groups), _kernels(weight, axes, groups), _grouped(out, groups)
    wanted = [slice(a.left, a.left + a.size) for a in axes]
    for group, blocks in _blocks((groups, weight.shape[1]), kernels.shape[1] + grad.shape[0], axes):
        spectra = _by_frequency(gradient_spectrum(grads[group], axes), axes)
        for block in blocks:
            filters = _by_frequency(_kernel_spectrum(kernels[group, :, block], axes), axes)
            inputs[group, :, block] = _values(spectra @ filters, axes, wanted)
    return out


def weight_gradient(
    grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """The gradient of `output` with respect to its weight, (C_out, C_in/groups, *kernel_size)."""
    axes = axes_of(x.shape[2:], kernel_size, stride, padding)
    out = x.new_zeros((grad.shape[1], x.shape[1] // groups, *kernel_size))
    grads, images, kernels = _grouped(grad, groups), _grouped(x, groups), _kernels(out, axes, groups)
    wanted = [slice(0, a.taps) for a in axes]
    for group, blocks in _blocks(kernels.shape[:2], kernels.shape[2] + x.shape[0], axes):
        spectra = _by_frequency(image_spectrum(images[group], axes), axes)
        for block in blocks:
            factors = _by_frequency(gradient_spectrum(grads[group, :, block], axes), axes)
            kernels[group, block] = _values(factors.mT.conj_physical() @ spectra, axes, wanted)
    return out


def _grouped(images: Tensor, groups: int) -> Tensor:
    """(N, C, *size) as (groups, N, C/groups, *size)."""
    return images.unflatten(1, (groups, -1)).transpose(0, 1)


def _kernels(weight: Tensor, axes: list[Axis], groups: int) -> Tensor:
    """The taps that meet the image, (groups, C_out/groups, C_in/groups, *taps)."""
    return weight[spatial([slice(a.first_tap, a.first_tap + a.taps) for a in axes])].unflatten(0, (groups, -1))


def _kernel_spectrum(kernels: Tensor, axes: list[Axis]) -> Tensor:
    return transform(kernels.to(compute_dtype(kernels.dtype)), axes)


def _by_frequency(spectra: Tensor, axes: list[Axis]) -> Tensor:
    """(groups, A, B, *frequencies) as (groups, frequencies, A, B)."""
    return spectra.flatten(-len(axes)).movedim(-1, 1)


def _values(products: Tensor, axes: list[Axis], wanted: list[slice]) -> Tensor:
    """(groups, frequencies, A, B) back to what is wanted of (groups, A, B, *lengths)."""
    frequencies = [*(a.length for a in axes[:-1]), axes[-1].length // 2 + 1]
    return inverse(products.movedim(1, -1).unflatten(-1, frequencies), axes)[spatial(wanted)]


def _blocks(channels: Sequence[int], spectra: int, axes: list[Axis]) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the groups, each with slices of its channels: as many as take `_BLOCK_BYTES`.

    Args:
        channels: the number of groups, and of the channels of each.
        spectra: how many spectra there are for a channel.
    """
    groups, width = channels
    count = max(1, _BLOCK_BYTES // (4 * spectra * math.prod(a.length for a in axes)))
    blocks = [slice(first, first + count) for first in range(0, width, count)]
    for first in range(0, groups, max(1, count // width)):
        yield slice(first, first + max(1, count // width)), blocks
