"""Depthwise convolution as a dense matrix per channel, for small maps that the kernel covers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .algorithm import Algorithm
from .problem import Problem, compute_dtype, output_size

__all__ = ["GEMM"]

_MAX_PIXELS = 1024
_CHUNK_ELEMENTS = 1 << 22


def tap_index(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    device: torch.device,
) -> Tensor:
    """The flat kernel tap at which an output pixel meets an input pixel.

    Returns:
        (outputs, inputs) int64, with the number of taps where they do not meet.
    """
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    meets = torch.ones(1, 1, dtype=torch.bool, device=device)
    sizes = output_size(input_size, kernel_size, stride, padding)
    for n, k, s, p, m in zip(input_size, kernel_size, stride, padding, sizes, strict=True):
        places = torch.arange(n, device=device) - s * torch.arange(m, device=device)[:, None] + p
        inside = (places >= 0) & (places < k)
        index = (index[:, None, :, None] * k + places[None, :, None, :]).flatten(2).flatten(0, 1)
        meets = (meets[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
    return index.where(meets, math.prod(kernel_size))


class GEMM(Algorithm):
    """Batched matrix products with the (outputs, inputs) Toeplitz matrix of each channel."""

    name = "gemm"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        pixels = max(math.prod(problem.input_size), math.prod(problem.output_size))
        if pixels > _MAX_PIXELS:
            return f"it builds a dense matrix per channel, and {pixels} pixels are more than {_MAX_PIXELS}"
        return None

    def features(self, pass_: str, problem: Problem) -> tuple[float, ...]:
        matrix = problem.channels * math.prod(problem.input_size) * math.prod(problem.output_size)
        return (1.0, matrix, problem.batch * matrix, problem.elements)

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        index = tap_index(x.shape[2:], weight.shape[2:], stride, padding, x.device)
        out = _multiply(x, weight, index)
        out = out if bias is None else out.add_(bias[:, None])
        return out.reshape(*x.shape[:2], *output_size(x.shape[2:], weight.shape[2:], stride, padding))

    def input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        index = tap_index(input_size, weight.shape[2:], stride, padding, grad.device)
        return _multiply(grad, weight, index.T).reshape(*grad.shape[:2], *input_size)

    def weight(
        self, grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        index = tap_index(x.shape[2:], kernel_size, stride, padding, x.device)
        channels, taps = x.shape[1], math.prod(kernel_size)
        sums = torch.zeros(channels, taps + 1, dtype=compute_dtype(x.dtype), device=x.device)
        for c in _chunks(channels, index.numel()):
            # (c, outputs, N) @ (c, N, inputs)
            products = grad[:, c].flatten(2).permute(1, 2, 0) @ x[:, c].flatten(2).transpose(0, 1)
            sums[c].index_add_(1, index.flatten(), products.flatten(1).to(sums.dtype))
        return sums[:, :taps].reshape(channels, 1, *kernel_size).to(x.dtype)


def _multiply(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """(N, C, rows of index) products of x (N, C, *columns of index) with the matrices of taps at `index`."""
    taps = torch.nn.functional.pad(weight.flatten(1), (0, 1))
    out = x.new_empty(*x.shape[:2], index.shape[0])
    for c in _chunks(x.shape[1], index.numel()):
        matrices = taps[c][:, index.T]
        out[:, c] = (x[:, c].flatten(2).transpose(0, 1) @ matrices).transpose(0, 1)
    return out


def _chunks(channels: int, matrix: int) -> list[slice]:
    """Slices of the channels whose matrices together stay small."""
    width = max(1, _CHUNK_ELEMENTS // matrix)
    return [slice(c, c + width) for c in range(0, channels, width)]
