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


def _gradient(name: str, tensors: dict[str, Tensor], size: Sequence[int], last: bool, geometry: Any) -> Tensor:
    """The pass that gives one of "x", "weight" and "grad" of the other two; the others are not read.

    `size` is the spatial one of the result. A backward may run under a transform that its forward was not under.
    """
    is_plain = aten.plain_only()
    if name == "grad":
        return (aten.convolution if is_plain else conv)(tensors["x"], tensors["weight"], None, *geometry)
    if name == "weight":
        return (aten.weight_gradient if is_plain else weight_gradient)(tensors["grad"], tensors["x"], size, *geometry)
    if is_plain:
        return aten.input_gradient(tensors["grad"], tensors["weight"], size, *geometry)
    return input_gradient(tensors["grad"], tensors["weight"], size, last, *geometry)


def _register_gradients(operator: Any, taken: tuple[str, str], given: str) -> None:
    """Registers the gradients of an operator that takes two of "x", "weight" and "grad" first, and gives the third."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second = inputs[:2]
        # An image that only a weight's gradient would read is not kept for a frozen weight.
        ctx.save_for_backward(first if ctx.needs_input_grad[1] else None, second if ctx.needs_input_grad[0] else None)
        ctx.layouts = [(t.shape[2:], memory_format(t) is not torch.contiguous_format) for t in (first, second)]
        ctx.geometry, ctx.forced = inputs[-3:], forced()

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = dict(zip((*taken, given), (*ctx.saved_tensors, grad), strict=True))
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        with inherited(ctx.forced):
            for i, name in enumerate(taken):
                if ctx.needs_input_grad[i]:
                    size, last = ctx.layouts[i]
                    grads[i] = _gradient(name, tensors, size, last, ctx.geometry)
        if ctx.needs_input_grad[2]:  # the bias
            grads[2] = grad.sum([0, *range(2, grad.ndim)])
        return tuple(grads)

    operator.register_autograd(backward, setup_context=save)


_register_gradients(conv, ("x", "weight"), "grad")
_register_gradients(input_gradient, ("grad", "weight"), "x")
_register_gradients(weight_gradient, ("grad", "x"), "weight")

autocast.register("conv", conv)

# ----------------------------------------------------------------------------------------------- FLOP counts


def _flops(grad: Sequence[int], weight: Sequence[int]) -> int:
    """Of each pass, by the shapes of the output, or its gradient, and of the weight."""
    return 2 * math.prod(grad) * math.prod(weight[1:])


_passes = torch.ops.timm_contconv
register_flop_formula(_passes.conv)(lambda x, weight, *_, out_shape, **__: _flops(out_shape, weight))
register_flop_formula(_passes.conv_input_gradient)(lambda grad, weight, *_, **__: _flops(grad, weight))
register_flop_formula(_passes.conv_weight_gradient)(lambda grad, x, *_, out_shape, **__: _flops(grad, out_shape))
