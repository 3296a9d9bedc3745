"""PyTorch's own convolution, as it stands and on channels-last copies."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .algorithm import Algorithm
from .problem import Problem, new_tensor

__all__ = ["ChannelsLast", "PyTorch"]

_aten = torch.ops.aten


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    dims = len(stride)
    return _aten.convolution(x, weight, bias, stride, padding, [1] * dims, False, [0] * dims, weight.shape[0])


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dims = len(stride)
    return _aten.convolution_backward(
        grad, x, weight, None, stride, padding, [1] * dims, False, [0] * dims, weight.shape[0], mask
    )


_HANGS = "on the CPU, bfloat16 and kernels wider than 13 can send oneDNN's channels-last kernel into an endless loop"


def _onednn_hangs(problem: Problem) -> bool:
    """Seen with torch 2.15 at 4, 16 and 32 channels, 56² pixels and 17² taps."""
    return problem.device == "cpu" and problem.dtype == torch.bfloat16 and max(problem.kernel_size) > 13


class PyTorch(Algorithm):
    """aten's convolution on the tensors as they come."""

    name = "pytorch"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        return _HANGS if problem.channels_last and _onednn_hangs(problem) else None

    def features(self, pass_: str, problem: Problem) -> tuple[float, ...]:
        # oneDNN changes its kernels at these sizes, and the time of a product changes up to twentyfold.
        size = max(problem.kernel_size)
        banded = [problem.macs if low < size <= high else 0 for low, high in pairwise((0, 3, 13, math.inf))]
        return (1.0, *banded, problem.inner_macs, problem.elements, problem.taps)

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        return _convolution(x, weight, bias, stride, padding)

    def input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        # Read for its shape and layout only.
        x = new_tensor(grad, (*grad.shape[:2], *input_size))
        return _convolution_backward(grad, x, weight, stride, padding, [True, False, False])[0]

    def weight(
        self, grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        weight = x.new_empty((x.shape[1], 1, *kernel_size))
        return _convolution_backward(grad, x, weight, stride, padding, [False, True, False])[1]


class ChannelsLast(PyTorch):
    """aten's convolution on channels-last copies.

    On the CPU this is oneDNN's vectorised kernel, some 20 times faster at 23² than the one for contiguous
    tensors, so the two copies pay. The gradient for the input is the convolution with the flipped kernel where
    the stride is 1. One spatial dimension runs as an image of height 1.
    """

    name = "channels_last"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if problem.ndim > 2:
            return "it needs 1 or 2 spatial dimensions"
        return _HANGS if _onednn_hangs(problem) else None

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        out = _convolution(_image(x), _lift(weight), bias, *_lift_sizes(stride, padding))
        return out.reshape(*out.shape[:2], *out.shape[6 - x.ndim :])

    def input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        spatial = range(2, weight.ndim)
        flipped = [k - 1 - p for k, p in zip(weight.shape[2:], padding, strict=True)]
        if all(s == 1 for s in stride) and min(flipped) >= 0:
            return self.output(grad, weight.flip(tuple(spatial)), None, stride, flipped)
        image, kernel = _image(grad), _lift(weight)
        size = [1] * (2 - len(stride)) + list(input_size)
        out = super().input(image, kernel, size, *_lift_sizes(stride, padding))
        return out.reshape(*grad.shape[:2], *input_size)

    def weight(
        self, grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        size = [1] * (2 - len(stride)) + list(kernel_size)
        out = super().weight(_image(grad), _image(x), size, *_lift_sizes(stride, padding))
        return out.reshape(x.shape[1], 1, *kernel_size)


def _lift(x: Tensor) -> Tensor:
    """One spatial dimension as the width of an image of height 1."""
    return x.unsqueeze(2) if x.ndim == 3 else x


def _image(x: Tensor) -> Tensor:
    return _lift(x).contiguous(memory_format=torch.channels_last)


def _lift_sizes(stride: Sequence[int], padding: Sequence[int]) -> tuple[list[int], list[int]]:
    missing = 2 - len(stride)
    return [1] * missing + list(stride), [0] * missing + list(padding)
