"""The one entry: every layer convolves with its dense kernel through it."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten, operator
from .autocast import autocast_dtype
from .choose import binding, decisions, gains, is_counting, keep, state
from .forced import forced
from .prior import is_large
from .problem import Problem, fits, has_outputs

__all__ = ["conv"]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    dilation: Sequence[int] = (),
) -> Tensor:
    """Convolution with symmetric zero padding, in 1, 2 or 3 spatial dimensions, by the fastest algorithm known.

    Differentiable to any order, and one operator in compiled graphs. It is PyTorch's own convolution where nothing is
    gained by another, with dilation, under the transforms of torch.func, in forward mode, under torch.export and
    torch.jit.trace, and for integers and complex numbers; and PyTorch's own error where arguments do not fit.

    A NaN or Inf in an image does not reach other images. Large kernels may run by Fourier transforms, which spread it
    over its image and not only to the outputs whose kernels meet it (not so under `torch.autograd.detect_anomaly`).

    Args:
        x: (N, C_in, *size) images, or one, (C_in, *size).
        weight: (C_out, C_in/groups, *kernel) kernels.
        bias: (C_out,), or None.
        stride, padding: one int per spatial dimension.
        groups: number of blocks of channels that are convolved apart.
        dilation: pixels between neighbours of the kernel, one int per spatial dimension; 1 if not given.

    Returns:
        (N, C_out, *output_size), in the memory format of `x`; without N as `x` is.

    Raises:
        ValueError: if an algorithm is forced that does not apply.
        RuntimeError: from PyTorch, if shapes, dtypes or devices do not fit together.
    """
    if x.ndim == weight.ndim - 1:
        return conv(x.unsqueeze(0), weight, bias, stride, padding, groups, dilation).squeeze(0)
    geometry = tuple(stride), tuple(padding), groups
    if dilation and max(dilation) > 1:
        return aten.convolution(x, weight, bias, *geometry, tuple(dilation))
    if not x.is_floating_point() or aten.plain_only():
        return aten.convolution(x, weight, bias, *geometry)
    if torch.compiler.is_compiling():
        is_ours = _may_gain(x, weight, bias, *geometry)
    elif forced() or is_counting():
        is_ours = True
    else:
        passes = _passes(x, weight, bias)
        key, run = _decision(passes, x, weight, bias, *geometry)
        is_ours = run is not None
        if is_ours and not passes and _is_unobserved(x, weight):
            if isinstance(run, Problem):
                run = binding(key, run, (x, weight, bias))
            return run(x, weight, bias)
    return (operator.conv if is_ours else aten.convolution)(x, weight, bias, *geometry)


def _passes(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[str, ...]:
    """The passes that will run, as far as is known; none in inference, where only the output is wanted."""
    if not torch.is_grad_enabled():
        return ()
    of_both = (*("input",) * x.requires_grad, *("weight",) * weight.requires_grad)
    return ("output", *of_both) if of_both or (bias is not None and bias.requires_grad) else ()


def _decision(
    passes: tuple[str, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> tuple[Hashable, Any]:
    """A key, and what is kept by it: the problem where the operator may be faster than PyTorch's own, or else None.

    In inference what computes it takes the place of the problem as soon as it is known.
    """
    dtype = autocast_dtype(x)
    images, kernels = (x.shape, x.stride(), x.dtype, x.device), (weight.shape, weight.dtype, weight.device)
    extra = None if bias is None else (bias.shape, bias.dtype, bias.device)
    key = (images, kernels, extra, stride, padding, groups, passes, dtype, state())
    try:
        return key, decisions[key]
    except KeyError:
        problem = None
        if _may_gain(x, weight, bias, stride, padding, groups) and has_outputs(x, weight, stride, padding):
            problem = Problem.of(x.shape, weight.shape, stride, padding, groups, x)._replace(dtype=dtype)
        problem = problem if problem is not None and gains(passes or ("output",), problem) else None
        keep(key, problem)
        return key, problem


def _is_unobserved(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing has to see an operator: then short calls are spared the way through PyTorch's dispatcher."""
    if type(x) is not Tensor or type(weight) not in (Tensor, torch.nn.Parameter):
        return False
    is_seen = torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled()
    return not (is_seen or torch._C._is_any_autocast_enabled())


def _may_gain(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether the operator may be faster, by what does not change with the size of images: one graph serves all."""
    if not fits(x, weight, bias, stride, padding, groups):
        return False
    is_depthwise = 1 < groups == x.shape[1] == weight.shape[0]
    return is_large(weight.shape[2:], is_depthwise) and (is_depthwise or x.device.type == "cpu")
