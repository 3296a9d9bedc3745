"""The one entry: every layer convolves with its dense kernel through it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import operator, plain
from .autocast import autocast_dtype
from .choose import decided, gains, state
from .forced import forced
from .prior import is_large
from .problem import Problem, kind_misfit, memory_format, output_size, size_misfit

__all__ = ["conv"]


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """Convolution with symmetric zero padding, in 1, 2 or 3 spatial dimensions, by the fastest algorithm known.

    Differentiable to any order, and one operator in compiled and exported graphs. It is PyTorch's own convolution where
    nothing is gained by another, under the transforms of torch.func, in forward mode, under torch.jit.trace, and for
    integers and complex numbers; and PyTorch's own error where arguments do not fit.

    A NaN or Inf in an image does not reach other images. Large kernels may run by Fourier transforms, which spread it
    over its image and not only to the outputs whose kernels meet it (not so under `torch.autograd.detect_anomaly`).

    Args:
        x: (N, C_in, *size) images, or one, (C_in, *size).
        weight: (C_out, C_in/groups, *kernel) kernels.
        bias: (C_out,), or None.
        stride, padding: one int per spatial dimension.
        groups: number of blocks of channels that are convolved apart.

    Returns:
        (N, C_out, *output_size), in the memory format of `x`; without N as `x` is.

    Raises:
        ValueError: if an algorithm is forced that does not apply.
        RuntimeError: from PyTorch, if shapes, dtypes or devices do not fit together.
    """
    if x.ndim == weight.ndim - 1:
        return conv(x.unsqueeze(0), weight, bias, stride, padding, groups).squeeze(0)
    if _is_ours(x, weight, bias, stride, padding, groups):
        return operator.conv(x, weight, bias, stride, padding, groups)
    return plain.convolution(x, weight, bias, stride, padding, groups)


def _is_ours(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether the operator runs, and not PyTorch's own convolution."""
    if not x.is_floating_point() or plain.is_transformed() or torch.jit.is_tracing():
        return False
    if torch.compiler.is_compiling():
        return _may_gain(x, weight, bias, stride, padding, groups)
    if forced():
        return True
    passes: tuple[str, ...] = ("output",)
    if torch.is_grad_enabled():
        passes += ("input",) * x.requires_grad + ("weight",) * weight.requires_grad
    kinds = tuple((t.shape, t.dtype, t.device) for t in (x, weight, bias) if t is not None)
    last, dtype = memory_format(x) is not torch.contiguous_format, autocast_dtype(x)
    key = (passes, kinds, tuple(stride), tuple(padding), groups, last, dtype, state())
    return decided(key, lambda: _gains(passes, x, weight, bias, stride, padding, groups))


def _may_gain(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether the operator may be faster, by what does not change with the size of images: one graph serves all."""
    of_bias = None if bias is None else bias.shape
    if kind_misfit(x, weight, bias) or size_misfit(x.shape, weight.shape, of_bias, stride, padding, groups):
        return False
    is_depthwise = 1 < groups == x.shape[1] == weight.shape[0]
    if x.device.type != "cpu":
        return is_depthwise and is_large(weight.shape[2:], is_depthwise)
    return is_large(weight.shape[2:], is_depthwise)


def _gains(
    passes: Sequence[str],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> bool:
    if not _may_gain(x, weight, bias, stride, padding, groups):
        return False
    if min(x.shape[2:]) < 1 or min(output_size(x.shape[2:], weight.shape[2:], stride, padding)) < 1:
        return False
    problem = Problem.of(x.shape, weight.shape, stride, padding, groups, x)
    return gains(passes, problem._replace(dtype=autocast_dtype(x)))
