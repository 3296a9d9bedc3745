"""Depthwise convolution on the CPU by a compiled loop nest over channels (direct.cpp)."""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem, new_tensor
from .algorithm import Algorithm
from .library import library

__all__ = ["Direct", "as_struct"]

_DTYPES = (torch.float32, torch.bfloat16)
_TASKS_PER_THREAD = 4


class Direct(Algorithm):
    """All products with pixels and none with the padding, from tensors of any layout.

    Weights and sums are float32. Two spatial dimensions; one runs as an image of height 1.
    """

    name = "direct"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if not problem.is_depthwise:
            return "it is for depthwise convolutions only"
        if problem.device.type != "cpu":
            return "it runs on the CPU only"
        if problem.dtype not in _DTYPES:
            return "it computes float32 and bfloat16 only"
        if problem.ndim > 2:
            return "it needs 1 or 2 spatial dimensions"
        if library() is None:
            return "it could not be compiled (see the warning)"
        return None

    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.bound(problem, x)(x, weight, bias)

    def bound(self, problem: Problem, like: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        shape, strides = problem.output_shape, new_tensor(like, problem.output_shape).stride()
        fields, splits = as_struct(problem, torch.get_num_threads(), like.stride(), strides)
        function = _function("contconv_forward", 4)

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = x.new_empty_strided(shape, strides)
            weight, bias = _floats(weight), None if bias is None else _floats(bias)
            pointer = None if bias is None else bias.data_ptr()
            function(fields, splits, x.data_ptr(), weight.data_ptr(), pointer, out.data_ptr())
            return out

        return run

    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        out = new_tensor(grad, problem.input_shape)
        _call("contconv_input_gradient", problem, out, grad, grad, _floats(weight), out)
        return out

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        splits = _splits(problem, torch.get_num_threads())
        parts = torch.zeros(splits, *problem.weight_shape)
        _call("contconv_weight_gradient", problem, x, grad, grad, x, parts)
        return parts.sum(0).to(x.dtype) if splits > 1 else parts[0].to(x.dtype)


def _floats(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _splits(problem: Problem, threads: int) -> int:
    """Into how many parts the batch goes, so that every thread has blocks of channels to work on."""
    blocks = -(-problem.in_channels // _library().contconv_lanes())
    return max(1, min(problem.batch, -(-_TASKS_PER_THREAD * threads // blocks)))


@lru_cache(maxsize=8)
def _function(name: str, tensors: int) -> Any:
    """A function of the library that takes a problem, a number of splits, and tensors."""
    function = getattr(_library(), name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * tensors]
    function.restype = None
    return function


def _library() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the direct algorithm could not be compiled; see the warning at its first use")
    return loaded


@lru_cache(maxsize=4096)
def as_struct(
    problem: Problem, threads: int, image: tuple[int, ...], out: tuple[int, ...]
) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """The fields of `struct Problem` (tiles.h), in its order, and the splits; `image` and `out` are strides."""
    missing = 2 - problem.ndim
    ones, zeros = [1] * missing, [0] * missing
    values = [
        *(problem.batch, problem.in_channels, threads, int(problem.dtype == torch.bfloat16)),
        *(*ones, *problem.input_size, *ones, *problem.output_size, *ones, *problem.kernel_size),
        *(*ones, *problem.stride, *zeros, *problem.padding),
        *(*image[:2], *zeros, *image[2:]),
        *(*out[:2], *zeros, *out[2:]),
    ]
    return (ctypes.c_int64 * len(values))(*values), _splits(problem, threads)


def _call(name: str, problem: Problem, image: Tensor, out: Tensor, *tensors: Tensor | None) -> None:
    """Calls a function of the library; `image` and `out` are x and the output, or their gradients."""
    fields, splits = as_struct(problem, torch.get_num_threads(), image.stride(), out.stride())
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    _function(name, len(pointers))(fields, splits, *pointers)
