"""PyTorch's own convolution and its two gradients, in 1, 2 or 3 spatial dimensions, and when only they will do."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import autocast_dtype

__all__ = ["convolution", "input_gradient", "is_exporting", "plain_only", "weight_gradient"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@torch.compiler.assume_constant_result  # torch.compile of torch 2.10 takes PyTorch's function for True
def is_exporting() -> bool:
    """Whether torch.export runs; False under torch.compile."""
    return torch.compiler.is_exporting()


def plain_only() -> bool:
    """Whether only PyTorch's own operators will do.

    Custom operators refuse the transforms of torch.func and lose the tangents of differentiation in forward mode. And
    no other program knows them: a model that is exported or traced holds none.
    """
    if is_exporting() or torch.jit.is_tracing():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dilation: Sequence[int] | int = 1,
) -> Tensor:
    """The convolution of x (N, C_in, *size) with weight (C_out, C_in/groups, *kernel), plus bias (C_out,)."""
    convolve, geometry = _CONVOLUTIONS[weight.ndim - 2], (tuple(stride), tuple(padding), dilation, groups)
    if not _is_wrong_in_half_precision(x, weight):
        return convolve(x, weight, bias, *geometry)
    with torch.autocast("cpu", enabled=False):
        wide = convolve(x.float(), weight.float(), None if bias is None else bias.float(), *geometry)
    return wide.to(autocast_dtype(x))


def _is_wrong_in_half_precision(x: Tensor, weight: Tensor) -> bool:
    """Where oneDNN's bfloat16 and float16 convolutions are wrong on processors with matrix units (torch 2.15).

    Seen with 2, 4, ..., 14 channels in a group and a row of the kernel of 32 * n numbers, n of 2 and more.
    """
    channels, row = weight.shape[1], weight.shape[1] * weight.shape[-1]
    if channels >= 16 or channels % 2 or row % 32 or row < 64 or not x.is_cpu:
        return False
    return autocast_dtype(x) in (torch.bfloat16, torch.float16)


def input_gradient(grad: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    """The gradient of `convolution` for x, (N, C_in, *input_size); geometry: stride, padding and groups."""
    x = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * geometry[-1], *input_size)
    return _gradients((True, False, False), grad, x, weight, *geometry)[0]


def weight_gradient(grad: Tensor, x: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    """The gradient of `convolution` for its weight, (C_out, C_in/groups, *kernel_size); geometry as above."""
    weight = x.new_empty(1).expand(grad.shape[1], x.shape[1] // geometry[-1], *kernel_size)
    return _gradients((False, True, False), grad, x, weight, *geometry)[1]


def _gradients(
    wanted: tuple[bool, bool, bool],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    ones, zeros = [1] * len(stride), [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, ones, False, zeros, groups, wanted
    )
