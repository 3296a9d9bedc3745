"""Depthwise convolution on CUDA by Triton (triton_kernels.py)."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from .algorithm import Algorithm

__all__ = ["Triton"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS, _DEPTH, _MOST_COLUMNS = 64, 32, 64
# Shares of the rows over which a weight's gradient is summed apart.
_ROWS_PER_SPLIT = 2048


class Triton(Algorithm):
    """Implicit matrix products on tensor cores, with float32 sums; float32 inputs are not rounded to TF32.

    Images are made contiguous. Two spatial dimensions; one runs as an image of height 1. With TRITON_INTERPRET=1 in
    the environment it runs on the CPU, slowly, for tests.
    """

    name = "triton"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if not problem.is_depthwise:
            return "it is for depthwise convolutions only"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if problem.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it runs on CUDA only (or with TRITON_INTERPRET=1 in the environment)"
        if problem.dtype not in _DTYPES:
            return "it computes float32, bfloat16 and float16 only"
        if problem.ndim > 2:
            return "it needs 1 or 2 spatial dimensions"
        return None

    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from .triton_kernels import output_kernel

        out = x.new_empty(problem.output_shape)
        columns, grid = _grid(out)
        kernel = weight.to(x.dtype).contiguous()
        args = (x.contiguous(), kernel, kernel if bias is None else bias, out)
        tiles = {"ROWS": _ROWS, "COLUMNS": columns, "DEPTH": _DEPTH}
        with _device(x):
            output_kernel[grid](*args, *_sizes(problem), HAS_BIAS=bias is not None, **_options(x), **tiles)
        return out

    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        from .triton_kernels import input_kernel

        out = grad.new_empty(problem.input_shape)
        columns, grid = _grid(out)
        args = (grad.contiguous(), weight.to(grad.dtype).contiguous(), out)
        tiles = {"ROWS": _ROWS, "COLUMNS": columns, "DEPTH": _DEPTH}
        with _device(grad):
            input_kernel[grid](*args, *_sizes(problem), **_options(grad), **tiles)
        return out

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        from .triton_kernels import weight_kernel

        columns = _columns(grad.shape[-1])
        rows = _rows(grad)
        share = min(_ROWS_PER_SPLIT, -(-rows // _DEPTH) * _DEPTH)
        programs = -(-rows // share) * -(-grad.shape[-1] // columns)
        parts = torch.empty(programs, *problem.weight_shape, dtype=torch.float32, device=x.device)
        kernel_size = (1, *problem.kernel_size)[-2:]
        grid = (programs, kernel_size[0], x.shape[1])
        tiles = {"ROWS": _DEPTH, "COLUMNS": columns, "TAPS": _power_of_two(kernel_size[1])}
        args = (grad.contiguous(), x.contiguous(), parts)
        with _device(x):
            weight_kernel[grid](*args, *_sizes(problem), share, **_options(x), **tiles)
        return parts.sum(0).to(x.dtype)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _columns(width: int) -> int:
    return min(_MOST_COLUMNS, max(16, _power_of_two(width)))


def _rows(images: Tensor) -> int:
    return images.shape[0] * (images.shape[2] if images.ndim == 4 else 1)


def _grid(out: Tensor) -> tuple[int, tuple[int, int, int]]:
    """Columns per program, and the grid (row blocks, column blocks, channels) that covers `out`."""
    columns = _columns(out.shape[-1])
    return columns, (-(-_rows(out) // _ROWS), -(-out.shape[-1] // columns), out.shape[1])


def _sizes(problem: Problem) -> Sequence[int]:
    """Batch, channels, then height and width of the image, output, kernel, stride and padding."""
    missing = 2 - problem.ndim
    ones, zeros = [1] * missing, [0] * missing
    lifted = (*ones, *problem.input_size, *ones, *problem.output_size, *ones, *problem.kernel_size)
    return (problem.batch, problem.in_channels, *lifted, *ones, *problem.stride, *zeros, *problem.padding)


def _options(x: Tensor) -> dict[str, Any]:
    """How blocks are multiplied."""
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return {"PRECISION": precision, "UPCAST": not x.is_cuda}


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of `x`; a CPU has no number."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
