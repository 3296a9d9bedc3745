"""The geometry of a depthwise convolution, as every algorithm and the cost rule see it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CONVOLUTIONS",
    "PASSES",
    "Problem",
    "as_format",
    "compute_dtype",
    "memory_format",
    "new_tensor",
    "output_size",
]

#: PyTorch's convolutions, by number of spatial dimensions.
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

#: The three passes of a convolution: the output, the gradient for the input, the gradient for the weight.
PASSES = ("output", "input", "weight")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels are constructed in, and transforms run in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Spatial size of the output; the arguments hold one int per spatial dimension."""
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]


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
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def as_format(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the dtype, and the strides, that `new_tensor(like, x.shape)` has, copied only where they differ.

    `Tensor.contiguous` would not do: it leaves the strides of dimensions of size 1 as they are, and the
    operators promise the same strides as their fake kernels.
    """
    wanted = torch.empty(x.shape, device="meta", memory_format=memory_format(like)).stride()
    return x if x.stride() == wanted and x.dtype == like.dtype else new_tensor(like, x.shape).copy_(x)


@dataclass(frozen=True)
class Problem:
    """One depthwise convolution with symmetric zero padding; sizes hold one int per spatial dimension."""

    batch: int
    channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dtype: torch.dtype
    device: str
    channels_last: bool

    @classmethod
    def of(
        cls,
        like: Tensor,
        input_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> "Problem":
        """The problem of convolving inputs (N, C, *input_size) that have the dtype, device and layout of `like`."""
        return cls(
            like.shape[0],
            like.shape[1],
            tuple(input_size),
            tuple(kernel_size),
            tuple(stride),
            tuple(padding),
            like.dtype,
            like.device.type,
            memory_format(like) is not torch.contiguous_format,
        )

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        return tuple(output_size(self.input_size, self.kernel_size, self.stride, self.padding))

    @cached_property
    def elements(self) -> int:
        """Elements of input and output together."""
        return self.batch * self.channels * (math.prod(self.input_size) + math.prod(self.output_size))

    @cached_property
    def taps(self) -> int:
        """Elements of the weight."""
        return self.channels * math.prod(self.kernel_size)

    @cached_property
    def macs(self) -> int:
        """Multiply-adds as a convolution counts them, products with the padding included."""
        return self.batch * self.taps * math.prod(self.output_size)

    @cached_property
    def inner_macs(self) -> int:
        """Multiply-adds without the products with the padding."""
        products = 1
        axes = zip(self.input_size, self.output_size, self.kernel_size, self.stride, self.padding, strict=True)
        for size, out, kernel, stride, padding in axes:
            products *= sum(
                max(0, min(kernel, size + padding - stride * i) - max(0, padding - stride * i)) for i in range(out)
            )
        return self.batch * self.channels * products

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "contiguous"
        return (
            f"a {layout} {str(self.dtype).removeprefix('torch.')} input "
            f"{(self.batch, self.channels, *self.input_size)} on {self.device}, kernel {self.kernel_size}, "
            f"stride {self.stride}, padding {self.padding}"
        )
