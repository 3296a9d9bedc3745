"""The arguments of a convolution: whether they fit together, and what an algorithm sees of them."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import autocast_dtype

__all__ = [
    "PASSES",
    "Problem",
    "compute_dtype",
    "fits",
    "has_outputs",
    "in_format",
    "memory_format",
    "new_tensor",
    "output_size",
    "strides_of",
]

#: The three passes of a convolution: the output, the gradient for the input, the gradient for the weight.
PASSES = ("output", "input", "weight")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels are constructed in, and transforms run in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Spatial size of the output; the arguments hold one int per spatial dimension."""
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]


def fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether the arguments of a convolution fit together, but for the size of images; if not, PyTorch says why."""
    dims = weight.ndim - 2
    if not (1 <= dims <= 3 and x.ndim == dims + 2 and len(stride) == len(padding) == dims):
        return False
    if groups < 1 or x.shape[1] != groups * weight.shape[1] or weight.shape[0] % groups or 0 in weight.shape:
        return False
    if min(stride) < 1 or min(padding) < 0 or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    others = (weight,) if bias is None else (weight, bias)
    return x.is_floating_point() and all(_is_like(other, x) for other in others)


def has_outputs(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether images are large enough for kernels, which fit otherwise; if not, PyTorch says why."""
    return min(x.shape[2:]) > 0 and min(output_size(x.shape[2:], weight.shape[2:], stride, padding)) > 0


def _is_like(tensor: Tensor, x: Tensor) -> bool:
    """Whether both have one device, and one dtype once autocast has cast them."""
    same = tensor.dtype == x.dtype or autocast_dtype(tensor) == autocast_dtype(x)
    return same and tensor.device == x.device


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that results computed from `x` have: that of `x`, or contiguous where `x` has none."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def new_tensor(like: Tensor, size: Sequence[int]) -> Tensor:
    """Uninitialised tensor of `size`, with the dtype, device and memory format of `like`."""
    if like.is_contiguous():
        return like.new_empty(size)
    return like.new_empty_strided(size, strides_of(size, memory_format(like)))


def in_format(x: Tensor, dtype: torch.dtype, form: torch.memory_format) -> Tensor:
    """`x` with a dtype, and the strides that a new tensor of the format has, copied only where they differ.

    `Tensor.contiguous` would not do: it leaves the strides of dimensions of size 1 as they are, and the
    operators promise the same strides as their fake kernels.
    """
    if x.dtype == dtype and x.stride() == _strides(x.shape, form):
        return x
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=form).copy_(x)


def strides_of(size: Sequence[int], form: torch.memory_format) -> tuple[int, ...]:
    """Strides of a new tensor, also of symbolic sizes; an empty dimension counts as one of size 1."""
    order = list(range(len(size))) if form == torch.contiguous_format else [0, *range(2, len(size)), 1]
    strides, step = [0] * len(size), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= torch.sym_max(size[dim], 1)
    return tuple(strides)


_strides = lru_cache(maxsize=1024)(strides_of)


class Problem(NamedTuple):
    """One convolution with symmetric zero padding; sizes hold one int per spatial dimension."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    #: The layout of the images that a pass reads: x, or for the input pass the gradient of the output.
    channels_last: bool

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        groups: int,
        like: Tensor,
    ) -> "Problem":
        """The problem of shapes x (N, C_in, *size) and weight (C_out, C_in/groups, *kernel), of images like `like`."""
        sizes = tuple(x[2:]), tuple(weight[2:]), tuple(stride), tuple(padding)
        last = memory_format(like) is not torch.contiguous_format
        return cls(x[0], x[1], weight[0], groups, *sizes, like.dtype, like.device, last)

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is convolved with one kernel of its own."""
        return 1 < self.groups == self.in_channels == self.out_channels

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        return self.output_shape[2:]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, C_out, *output_size)."""
        return _output_shape(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C_in, *input_size)."""
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(C_out, C_in/groups, *kernel_size)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def macs(self) -> int:
        """Multiply-adds of a pass as a convolution counts them, products with the padding included."""
        return self.batch * math.prod(self.weight_shape) * math.prod(self.output_size)

    def __str__(self) -> str:
        kernel, stride, padding = ("x".join(map(str, s)) for s in (self.kernel_size, self.stride, self.padding))
        layout = "channels-last" if self.channels_last else "contiguous"
        return (
            f"{layout} {str(self.dtype).removeprefix('torch.')} {'x'.join(map(str, self.input_shape))} on "
            f"{self.device.type}, {self.out_channels} kernels {kernel}, stride {stride}, padding {padding}, "
            f"groups {self.groups}"
        )


@lru_cache(maxsize=4096)
def _output_shape(problem: Problem) -> tuple[int, ...]:
    size = output_size(problem.input_size, problem.kernel_size, problem.stride, problem.padding)
    return (problem.batch, problem.out_channels, *size)
