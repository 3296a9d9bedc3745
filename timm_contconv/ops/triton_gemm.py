"""Depthwise convolution on CUDA by Triton (triton_kernels.py)."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .algorithm import Algorithm
from .problem import Problem, output_size

__all__ = ["Triton"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS, _DEPTH, _MOST_COLUMNS = 64, 32, 64
# Shares of the rows over which a weight's gradient is summed apart.
_ROWS_PER_SPLIT = 2048


class Triton(Algorithm):
    """Implicit matrix products on tensor cores, with float32 sums; float32 inputs are not rounded to TF32.

    Images are made contiguous. Two spatial dimensions; one runs as an image of height 1. No measurement on a GPU is
    recorded yet, so the cost rule never picks it; force it with `ops.algorithm("triton")`. With TRITON_INTERPRET=1 in
    the environment it runs on the CPU, slowly, for tests.
    """

    name = "triton"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if problem.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it runs on CUDA only (or with TRITON_INTERPRET=1 in the environment)"
        if problem.dtype not in _DTYPES:
            return "it computes float32, bfloat16 and float16 only"
        if problem.ndim > 2:
            return "it needs 1 or 2 spatial dimensions"
        return None

    def features(self, pass_: str, problem: Problem) -> tuple[float, ...]:
        width, taps = problem.input_size[-1], problem.kernel_size[-1]
        return (1.0, problem.macs / taps * (min(width, _MOST_COLUMNS) + taps), problem.elements)

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        from .triton_kernels import output_kernel

        size = output_size(x.shape[2:], weight.shape[2:], stride, padding)
        out = x.new_empty((*x.shape[:2], *size))
        columns, grid = _grid(out)
        kernel = weight.to(x.dtype).contiguous()
        args = (x.contiguous(), kernel, kernel if bias is None else bias, out)
        sizes = _sizes(x.shape, size, weight.shape[2:], stride, padding)
        tiles = {"ROWS": _ROWS, "COLUMNS": columns, "DEPTH": _DEPTH}
        with _device(x):
            output_kernel[grid](*args, *sizes, HAS_BIAS=bias is not None, **_options(x), **tiles)
        return out

    def input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        from .triton_kernels import input_kernel

        out = grad.new_empty((*grad.shape[:2], *input_size))
        columns, grid = _grid(out)
        args = (grad.contiguous(), weight.to(grad.dtype).contiguous(), out)
        sizes = _sizes(out.shape, grad.shape[2:], weight.shape[2:], stride, padding)
        with _device(grad):
            input_kernel[grid](*args, *sizes, **_options(grad), ROWS=_ROWS, COLUMNS=columns, DEPTH=_DEPTH)
        return out

    def weight(
        self, grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        from .triton_kernels import weight_kernel

        columns = _columns(grad.shape[-1])
        rows = grad.shape[0] * (grad.shape[2] if grad.ndim == 4 else 1)
        share = min(_ROWS_PER_SPLIT, -(-rows // _DEPTH) * _DEPTH)
        programs = -(-rows // share) * -(-grad.shape[-1] // columns)
        parts = torch.empty(programs, x.shape[1], 1, *kernel_size, dtype=torch.float32, device=x.device)
        sizes = _sizes(x.shape, grad.shape[2:], kernel_size, stride, padding)
        grid = (programs, kernel_size[0] if len(kernel_size) == 2 else 1, x.shape[1])
        tiles = {"ROWS": _DEPTH, "COLUMNS": columns, "TAPS": _power_of_two(kernel_size[-1])}
        with _device(x):
            weight_kernel[grid](*(grad.contiguous(), x.contiguous(), parts), *sizes, share, **_options(x), **tiles)
        return parts.sum(0).to(x.dtype)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _columns(width: int) -> int:
    return min(_MOST_COLUMNS, max(16, _power_of_two(width)))


def _grid(out: Tensor) -> tuple[int, tuple[int, int, int]]:
    """Columns per program, and the grid (row blocks, column blocks, channels) that covers `out`."""
    columns = _columns(out.shape[-1])
    rows = out.shape[0] * (out.shape[2] if out.ndim == 4 else 1)
    return columns, (-(-rows // _ROWS), -(-out.shape[-1] // columns), out.shape[1])


def _sizes(
    image: Sequence[int],
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> list[int]:
    """Batch, channels, then height and width of the image, output, kernel, stride and padding."""
    missing = 2 - len(kernel)
    ones, zeros = [1] * missing, [0] * missing
    lifted = (*ones, *image[2:], *ones, *size, *ones, *kernel, *ones, *stride, *zeros, *padding)
    return [*image[:2], *lifted]


def _options(x: Tensor) -> dict[str, Any]:
    """How blocks are multiplied."""
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return {"PRECISION": precision, "UPCAST": not x.is_cuda}


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of `x`; a CPU has no number."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
