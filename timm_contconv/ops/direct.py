"""Depthwise convolution on the CPU by a compiled loop nest over channels (direct.cpp)."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .algorithm import Algorithm
from .build import library
from .problem import Problem, new_tensor, output_size

__all__ = ["Direct"]

_DTYPES = (torch.float32, torch.bfloat16)
_TASKS_PER_THREAD = 4
# Of the widest vectors, for the cost rule, which must not build the library to ask for its own.
_LANES = 16


class Direct(Algorithm):
    """All products with pixels and none with the padding, from tensors of any layout.

    Weights and sums are float32. Two spatial dimensions; one runs as an image of height 1.
    """

    name = "direct"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "it runs on the CPU only"
        if problem.dtype not in _DTYPES:
            return "it computes float32 and bfloat16 only"
        if problem.ndim > 2:
            return "it needs 1 or 2 spatial dimensions"
        if library() is None:
            return "it could not be compiled (see the warning)"
        return None

    def features(self, pass_: str, problem: Problem) -> tuple[float, ...]:
        # Lanes without a channel work all the same.
        fill = -(-problem.channels // _LANES) * _LANES / problem.channels
        return (1.0, fill * problem.inner_macs, problem.elements, fill * problem.taps)

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        out = new_tensor(x, (*x.shape[:2], *output_size(x.shape[2:], weight.shape[2:], stride, padding)))
        weight, bias = _floats(weight), None if bias is None else _floats(bias)
        problem = _problem(x, out, weight.shape[2:], stride, padding)
        _call("contconv_forward", problem, _splits(x), x, weight, bias, out)
        return out

    def input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        out = new_tensor(grad, (*grad.shape[:2], *input_size))
        weight = _floats(weight)
        problem = _problem(out, grad, weight.shape[2:], stride, padding)
        _call("contconv_input_gradient", problem, _splits(grad), grad, weight, out)
        return out

    def weight(
        self, grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        splits = _splits(x)
        parts = torch.zeros(splits, x.shape[1], 1, *kernel_size)
        problem = _problem(x, grad, kernel_size, stride, padding)
        _call("contconv_weight_gradient", problem, splits, grad, x, parts)
        return parts.sum(0).to(x.dtype) if splits > 1 else parts[0].to(x.dtype)


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _splits(x: Tensor) -> int:
    """Into how many parts the batch goes, so that every thread has blocks of channels to work on."""
    lanes = _library().contconv_lanes()
    blocks = -(-x.shape[1] // lanes)
    return max(1, min(x.shape[0], -(-_TASKS_PER_THREAD * torch.get_num_threads() // blocks)))


def _library() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the direct algorithm could not be compiled; see the warning at its first use")
    return loaded


def _problem(
    image: Tensor, out: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> ctypes.Array[ctypes.c_int64]:
    """The fields of `struct Problem` (tiles.h), in its order; `image` and `out` are x and the output or their
    gradients."""
    missing = 2 - len(stride)
    ones, zeros = [1] * missing, [0] * missing
    values = [
        *(image.shape[0], image.shape[1], torch.get_num_threads(), int(image.dtype == torch.bfloat16)),
        *(*ones, *image.shape[2:], *ones, *out.shape[2:], *ones, *kernel_size, *ones, *stride, *zeros, *padding),
        *(*image.stride()[:2], *zeros, *image.stride()[2:]),
        *(*out.stride()[:2], *zeros, *out.stride()[2:]),
    ]
    return (ctypes.c_int64 * len(values))(*values)


def _call(name: str, problem: ctypes.Array[ctypes.c_int64], splits: int, *tensors: Tensor | None) -> None:
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    getattr(_library(), name)(problem, ctypes.c_int64(splits), *pointers)
