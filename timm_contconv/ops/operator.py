"""The convolution as custom operators: PyTorch sees three opaque operators, for any groups and 1 to 3 dimensions.

The convolution and its two gradients are each linear in two tensors, so the gradients of the three are again among the
three, to any order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import aten, autocast
from .choose import choose
from .forced import forced, inherited
from .problem import Problem, fits, has_outputs, in_format, memory_format, new_tensor, output_size, strides_of

__all__ = ["conv", "input_gradient", "weight_gradient"]


@torch.library.custom_op("timm_contconv::conv", mutates_args=())
def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """Convolution of x (N, C_in, *size) with weight (C_out, C_in/groups, *kernel), plus bias (C_out,)."""
    if not (fits(x, weight, bias, stride, padding, groups) and has_outputs(x, weight, stride, padding)):
        return in_format(aten.convolution(x, weight, bias, stride, padding, groups), x.dtype, memory_format(x))
    problem = Problem.of(x.shape, weight.shape, stride, padding, groups, x)
    algorithm = choose("output", problem, (x, weight, bias))
    return in_format(algorithm.output(problem, x, weight, bias), x.dtype, memory_format(x))


@torch.library.custom_op("timm_contconv::conv_input_gradient", mutates_args=())
def input_gradient(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient (N, C_in, *input_size) for x, from the gradient (N, C_out, *output_size) of the output."""
    shape = (grad.shape[0], weight.shape[1] * groups, *input_size)
    problem = Problem.of(shape, weight.shape, stride, padding, groups, grad)
    algorithm = choose("input", problem, (grad, weight))
    return in_format(algorithm.input(problem, grad, weight), grad.dtype, _format(channels_last, grad.ndim))


@torch.library.custom_op("timm_contconv::conv_weight_gradient", mutates_args=())
def weight_gradient(
    grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """Gradient (C_out, C_in/groups, *kernel_size) for the weight, from x and the gradient of the output."""
    shape = (grad.shape[1], x.shape[1] // groups, *kernel_size)
    problem = Problem.of(x.shape, shape, stride, padding, groups, x)
    algorithm = choose("weight", problem, (grad, x))
    return in_format(algorithm.weight(problem, grad, x), x.dtype, torch.contiguous_format)


@conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, _groups = geometry
    if not (fits(x, weight, bias, *geometry) and has_outputs(x, weight, stride, padding)):
        return aten.convolution(x, weight, bias, *geometry)
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding)
    return new_tensor(x, (x.shape[0], weight.shape[0], *size))


@input_gradient.register_fake
def _(grad: Tensor, weight: Tensor, input_size: Sequence[int], channels_last: bool, *geometry: Any) -> Tensor:
    shape = (grad.shape[0], weight.shape[1] * geometry[-1], *input_size)
    form = _format(channels_last, grad.ndim)
    return grad.new_empty_strided(shape, strides_of(shape, form))


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, kernel_size: Sequence[int], *geometry: Any) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1] // geometry[-1], *kernel_size))


def _format(channels_last: bool, ndim: int) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


# ------------------------------------------------------------------------------------------------- gradients
# A backward may run under a transform that its forward was not under.


def _to_output(x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    return (aten.convolution if aten.plain_only() else conv)(x, weight, None, *geometry)


def _to_x(grad: Tensor, weight: Tensor, size: Sequence[int], last: bool, geometry: tuple[Any, ...]) -> Tensor:
    if aten.plain_only():
        return aten.input_gradient(grad, weight, size, *geometry)
    return input_gradient(grad, weight, size, last, *geometry)


def _to_weight(grad: Tensor, x: Tensor, size: Sequence[int], geometry: tuple[Any, ...]) -> Tensor:
    return (aten.weight_gradient if aten.plain_only() else weight_gradient)(grad, x, size, *geometry)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight = inputs[:2]
    # An image that only a weight's gradient would read is not kept for a frozen weight.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
    ctx.geometry, ctx.forced = inputs[-3:], forced()
    ctx.input_size, ctx.kernel_size, ctx.channels_last = x.shape[2:], weight.shape[2:], _is_last(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 6
    with inherited(ctx.forced):
        if ctx.needs_input_grad[0]:
            grads[0] = _to_x(grad, weight, ctx.input_size, ctx.channels_last, ctx.geometry)
        if ctx.needs_input_grad[1]:
            grads[1] = _to_weight(grad, x, ctx.kernel_size, ctx.geometry)
    if ctx.needs_input_grad[2]:
        grads[2] = grad.sum([0, *range(2, grad.ndim)])
    return tuple(grads)


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry, ctx.forced = inputs[-3:], forced()


def _input_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 7
    with inherited(ctx.forced):
        if ctx.needs_input_grad[0]:
            grads[0] = _to_output(x, weight, ctx.geometry)
        if ctx.needs_input_grad[1]:
            grads[1] = _to_weight(grad, x, weight.shape[2:], ctx.geometry)
    return tuple(grads)


def _weight_backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 6
    with inherited(ctx.forced):
        if ctx.needs_input_grad[0]:
            grads[0] = _to_output(x, weight, ctx.geometry)
        if ctx.needs_input_grad[1]:
            grads[1] = _to_x(grad, weight, x.shape[2:], _is_last(x), ctx.geometry)
    return tuple(grads)


def _is_last(x: Tensor) -> bool:
    return memory_format(x) is not torch.contiguous_format


conv.register_autograd(_backward, setup_context=_save)
input_gradient.register_autograd(_input_backward, setup_context=_save_both)
weight_gradient.register_autograd(_weight_backward, setup_context=_save_both)

autocast.register("conv", conv)

# ----------------------------------------------------------------------------------------------- FLOP counts


@register_flop_formula(torch.ops.timm_contconv.conv)
def _(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@register_flop_formula(torch.ops.timm_contconv.conv_input_gradient)
def _(grad: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * math.prod(weight[1:])


@register_flop_formula(torch.ops.timm_contconv.conv_weight_gradient)
def _(grad: Any, x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * math.prod(out_shape[1:])
