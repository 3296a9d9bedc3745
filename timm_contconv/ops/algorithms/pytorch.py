"""PyTorch's own convolution, as it stands and on channels-last copies."""

import torch
from torch import Tensor

from .. import aten
from ..problem import Problem
from .algorithm import Algorithm

__all__ = ["ChannelsLast", "PyTorch"]

_HANGS = "on the CPU, bfloat16 and kernels wider than 13 can send oneDNN's channels-last kernel into an endless loop"


def _onednn_hangs(problem: Problem) -> bool:
    """Seen with torch 2.15 at 4, 16 and 32 channels, 56² pixels and 17² taps."""
    is_suspect = problem.is_depthwise and problem.device.type == "cpu" and problem.dtype == torch.bfloat16
    return is_suspect and max(problem.kernel_size) > 13


class PyTorch(Algorithm):
    """PyTorch's convolution of the tensors as they come."""

    name = "pytorch"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        return _HANGS if problem.channels_last and _onednn_hangs(problem) else None

    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return aten.convolution(x, weight, bias, problem.stride, problem.padding, problem.groups)

    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        size = problem.input_size
        return aten.input_gradient(grad, weight, size, problem.stride, problem.padding, problem.groups)

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        size = problem.kernel_size
        return aten.weight_gradient(grad, x, size, problem.stride, problem.padding, problem.groups)


class ChannelsLast(PyTorch):
    """PyTorch's convolution of channels-last copies.

    On the CPU this is oneDNN's vectorised kernel, some 20 times faster at 23² than the one for contiguous
    tensors, so the two copies pay. The gradient for the input is the convolution with the flipped kernel where
    the stride is 1. One spatial dimension runs as an image of height 1.
    """

    name = "channels_last"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if not problem.is_depthwise:
            return "it is for depthwise convolutions only"
        if problem.ndim > 2:
            return "it needs 1 or 2 spatial dimensions"
        return _HANGS if _onednn_hangs(problem) else None

    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = super().output(_lifted(problem), _image(x), _lift(weight), bias)
        return out.reshape(problem.output_shape)

    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        flipped = tuple(k - 1 - p for k, p in zip(problem.kernel_size, problem.padding, strict=True))
        if max(problem.stride) == 1 and min(flipped) >= 0:
            turned = problem._replace(input_size=problem.output_size, padding=flipped)
            return self.output(turned, grad, weight.flip(tuple(range(2, weight.ndim))), None)
        out = super().input(_lifted(problem), _image(grad), _lift(weight))
        return out.reshape(problem.input_shape)

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        return super().weight(_lifted(problem), _image(grad), _image(x)).reshape(problem.weight_shape)


def _lifted(problem: Problem) -> Problem:
    """One spatial dimension as the width of an image of height 1."""
    if problem.ndim == 2:
        return problem
    return problem._replace(
        input_size=(1, *problem.input_size),
        kernel_size=(1, *problem.kernel_size),
        stride=(1, *problem.stride),
        padding=(0, *problem.padding),
    )


def _lift(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.ndim == 3 else x


def _image(x: Tensor) -> Tensor:
    return _lift(x).contiguous(memory_format=torch.channels_last)
