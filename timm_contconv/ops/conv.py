"""The router: one function through which every layer convolves with its dense kernel."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import plain
from .autocast import autocast_dtype
from .dense import chosen_conv, fft_conv, has_choice, is_cheaper_by_fft
from .depthwise import depthwise_conv as _operator
from .dispatch import forced, is_plain
from .problem import Problem, memory_format, per_dimension

__all__ = ["conv", "depthwise_conv", "depthwise_conv1d", "depthwise_conv2d", "depthwise_conv3d"]


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """Convolution with symmetric zero padding, in 1, 2 or 3 spatial dimensions.

    Args:
        x: (N, C_in, *size) images, or one, (C_in, *size).
        weight: (C_out, C_in/groups, *kernel) kernels.
        bias: (C_out,), or None.
        stride, padding: one int per spatial dimension.
        groups: number of blocks of channels that are convolved apart.

    Returns:
        (N, C_out, *output_size), in the memory format of `x`; without N as `x` is.
    """
    if x.ndim == weight.ndim - 1:
        return conv(x.unsqueeze(0), weight, bias, stride, padding, groups).squeeze(0)
    if 1 < groups == weight.shape[0] and weight.shape[1] == 1:
        return depthwise_conv(x, weight, bias, stride, padding)
    if torch.compiler.is_compiling():
        if has_choice(x, weight, bias, stride, padding, groups):
            return chosen_conv(x, weight, bias, stride, padding, groups)
    elif is_cheaper_by_fft(x, weight, bias, stride, padding, groups):
        return fft_conv(x, weight, bias, stride, padding, groups)
    return plain.convolution(x, weight, bias, stride, padding, groups)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """Convolution of every channel with its own kernel, by the fastest algorithm that is known for the shape.

    Differentiable to any order, and one operator in compiled and exported graphs. On CUDA it is PyTorch's own
    convolution unless another algorithm is forced: no faster one has been measured there yet. Under the transforms of
    torch.func, in forward mode, and for integers and complex numbers it is PyTorch's own whatever is forced.

    Args:
        x: (N, C, *size) images, in 1, 2 or 3 spatial dimensions and any layout.
        weight: (C, 1, *kernel) kernels.
        bias: (C,), or None.
        stride, padding: an int, or one per spatial dimension; zeros are padded on both sides.

    Returns:
        (N, C, *output_size), in the memory format of `x`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or a forced algorithm does not apply.
    """
    dims = weight.ndim - 2
    stride, padding = per_dimension(stride, dims), per_dimension(padding, dims)
    if _must_be_plain(x) or (not torch.compiler.is_compiling() and _is_best_plain(x, weight, stride, padding)):
        return plain.convolution(x, weight, bias, stride, padding, weight.shape[0])
    return _operator(x, weight, bias, stride, padding)


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """`depthwise_conv` of x (N, C, L) with weight (C, 1, K)."""
    return depthwise_conv(x, _with_dims(weight, 1), bias, stride, padding)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """`depthwise_conv` of x (N, C, H, W) with weight (C, 1, K_h, K_w)."""
    return depthwise_conv(x, _with_dims(weight, 2), bias, stride, padding)


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """`depthwise_conv` of x (N, C, D, H, W) with weight (C, 1, K_d, K_h, K_w)."""
    return depthwise_conv(x, _with_dims(weight, 3), bias, stride, padding)


def _with_dims(weight: Tensor, dims: int) -> Tensor:
    if weight.ndim != dims + 2:
        raise ValueError(f"weight {tuple(weight.shape)}: expected {dims + 2} dimensions")
    return weight


def _must_be_plain(x: Tensor) -> bool:
    return plain.is_transformed() or not x.is_floating_point()


def _is_best_plain(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether PyTorch's own convolution is best for all passes that will run, and nothing is forced."""
    if x.ndim != weight.ndim or forced():
        return False
    passes: tuple[str, ...] = ("output",)
    if torch.is_grad_enabled():
        passes += ("input",) * x.requires_grad + ("weight",) * weight.requires_grad
    last = memory_format(x) is not torch.contiguous_format
    return _is_plain(x.shape, weight.shape[2:], stride, padding, autocast_dtype(x), x.device.type, last, passes)


@lru_cache(maxsize=4096)
def _is_plain(
    x: torch.Size,
    kernel: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    channels_last: bool,
    passes: tuple[str, ...],
) -> bool:
    problem = Problem(x[0], x[1], tuple(x[2:]), tuple(kernel), stride, padding, dtype, device, channels_last)
    return is_plain(problem, passes)
