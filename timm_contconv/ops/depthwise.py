"""The depthwise convolution as custom operators: PyTorch sees three opaque operators and their gradients.

`depthwise_conv` and its two gradients are each linear in two tensors, so the gradients of the three are again
among the three, to any order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import autocast, plain
from .dispatch import choose, forced, inherited
from .problem import Problem, as_format, check, new_tensor, output_size

__all__ = ["depthwise_conv", "input_gradient", "weight_gradient"]


@torch.library.custom_op("timm_contconv::depthwise_conv", mutates_args=())
def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Depthwise convolution of x (N, C, *size) with weight (C, 1, *kernel) and bias (C,)."""
    _check(x, weight, bias, stride, padding)
    problem = Problem.of(x, x.shape[2:], weight.shape[2:], stride, padding)
    return as_format(choose("output", problem).output(x, weight, bias, stride, padding), x)


@torch.library.custom_op("timm_contconv::depthwise_conv_input_gradient", mutates_args=())
def input_gradient(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient (N, C, *input_size) for x, from the gradient (N, C, *output_size) of the output."""
    problem = Problem.of(grad, input_size, weight.shape[2:], stride, padding)
    return as_format(choose("input", problem).input(grad, weight, input_size, stride, padding), grad)


@torch.library.custom_op("timm_contconv::depthwise_conv_weight_gradient", mutates_args=())
def weight_gradient(
    grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient (C, 1, *kernel_size) for the weight, from x and the gradient of the output."""
    problem = Problem.of(x, x.shape[2:], kernel_size, stride, padding)
    return choose("weight", problem).weight(grad, x, kernel_size, stride, padding).contiguous()


@depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    _check(x, weight, bias, stride, padding)
    return new_tensor(x, (*x.shape[:2], *output_size(x.shape[2:], weight.shape[2:], stride, padding)))


@input_gradient.register_fake
def _(grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return new_tensor(grad, (*grad.shape[:2], *input_size))


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return x.new_empty((x.shape[1], 1, *kernel_size))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> None:
    if weight.shape[:2] != (x.shape[1], 1):
        raise ValueError(f"weight {tuple(weight.shape)}: expected ({x.shape[1]}, 1, ...) for x {tuple(x.shape)}")
    check(x, weight, bias, stride, padding, x.shape[1])


# ------------------------------------------------------------------------------------------------- gradients
# A backward may run under a transform that its forward was not under.


def _to_output(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    if plain.is_transformed():
        return plain.convolution(x, weight, None, stride, padding, x.shape[1])
    return depthwise_conv(x, weight, None, stride, padding)


def _to_x(grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    if plain.is_transformed():
        return plain.input_gradient(grad, weight, size, stride, padding, grad.shape[1])
    return input_gradient(grad, weight, size, stride, padding)


def _to_weight(grad: Tensor, x: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    if plain.is_transformed():
        return plain.weight_gradient(grad, x, size, stride, padding, grad.shape[1])
    return weight_gradient(grad, x, size, stride, padding)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.stride, ctx.padding = inputs
    # An image that only a weight's gradient would read is not kept for a frozen weight.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
    ctx.input_size, ctx.kernel_size, ctx.forced = x.shape[2:], weight.shape[2:], forced()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 5
    with inherited(ctx.forced):
        if ctx.needs_input_grad[0]:
            grads[0] = _to_x(grad, weight, ctx.input_size, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            grads[1] = _to_weight(grad, x, ctx.kernel_size, ctx.stride, ctx.padding)
    if ctx.needs_input_grad[2]:
        grads[2] = grad.sum([0, *range(2, grad.ndim)])
    return tuple(grads)


def _input_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(grad, weight)


def _input_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 5
    if ctx.needs_input_grad[0]:
        grads[0] = _to_output(x, weight, ctx.stride, ctx.padding)
    if ctx.needs_input_grad[1]:
        grads[1] = _to_weight(grad, x, weight.shape[2:], ctx.stride, ctx.padding)
    return tuple(grads)


def _weight_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(grad, x)


def _weight_backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 5
    if ctx.needs_input_grad[0]:
        grads[0] = _to_output(x, weight, ctx.stride, ctx.padding)
    if ctx.needs_input_grad[1]:
        grads[1] = _to_x(grad, weight, x.shape[2:], ctx.stride, ctx.padding)
    return tuple(grads)


depthwise_conv.register_autograd(_backward, setup_context=_save)
input_gradient.register_autograd(_input_backward, setup_context=_input_save)
weight_gradient.register_autograd(_weight_backward, setup_context=_weight_save)

autocast.register("depthwise_conv", depthwise_conv)

# ----------------------------------------------------------------------------------------------- FLOP counts


@register_flop_formula(torch.ops.timm_contconv.depthwise_conv)
def _(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[2:])


@register_flop_formula(torch.ops.timm_contconv.depthwise_conv_input_gradient)
def _(grad: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * math.prod(weight[2:])


@register_flop_formula(torch.ops.timm_contconv.depthwise_conv_weight_gradient)
def _(grad: Any, x: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * math.prod(kernel_size)
