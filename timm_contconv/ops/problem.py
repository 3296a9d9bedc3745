"""The arguments of a convolution, for both engines; and a depthwise one as every algorithm and its cost rule see it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .autocast import autocast_dtype

__all__ = [
    "PASSES",
    "Problem",
    "as_format",
    "check",
    "compute_dtype",
    "in_format",
    "kind_misfit",
    "memory_format",
    "new_tensor",
    "output_size",
    "per_dimension",
    "size_misfit",
]

#: The three passes of a convolution: the output, the gradient for the input, the gradient for the weight.
PASSES = ("output", "input", "weight")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels are constructed in, and transforms run in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Spatial size of the output; the arguments hold one int per spatial dimension."""
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]


def per_dimension(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A stride or padding as one int per spatial dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def kind_misfit(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """What is wrong with the dtypes and devices of a convolution's arguments; None where nothing is."""
    if not x.is_floating_point():
        return f"x is {x.dtype}: expected real floating-point numbers; torch.nn.functional's convolutions take others"
    if not _is_like(weight, x):
        return f"weight is {weight.dtype} on {weight.device}: expected x's {x.dtype} on {x.device}"
    if bias is not None and not _is_like(bias, x):
        return f"bias is {bias.dtype} on {bias.device}: expected x's {x.dtype} on {x.device}"
    return None


def size_misfit(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> str | None:
    """What is wrong with the shapes of a convolution's arguments, but for the size of images; None where nothing is."""
    dims = len(stride)
    if not 1 <= dims <= 3 or len(padding) != dims or len(weight) != dims + 2 or len(x) != dims + 2:
        return (
            f"x {tuple(x)}, weight {tuple(weight)}, stride {tuple(stride)}, padding {tuple(padding)}: expected "
            "(N, C_in, *size), (C_out, C_in/groups, *kernel), and one stride and padding for each of 1 to 3 dimensions"
        )
    if groups < 1 or x[1] != groups * weight[1] or weight[0] % groups:
        return (
            f"weight {tuple(weight)}: expected (C_out, C_in/groups, *kernel) and a C_out that groups={groups} divides, "
            f"for x {tuple(x)}"
        )
    if 0 in weight:
        return f"weight {tuple(weight)}: expected no dimension of size 0"
    if bias is not None and tuple(bias) != (weight[0],):
        return f"bias {tuple(bias)}: expected ({weight[0]},)"
    if min(stride) < 1 or min(padding) < 0:
        return f"stride={tuple(stride)}, padding={tuple(padding)}: expected at least 1 and 0"
    return None


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> None:
    """Raises a ValueError where the arguments of a convolution do not fit together."""
    of_bias = None if bias is None else bias.shape
    error = size_misfit(x.shape, weight.shape, of_bias, stride, padding, groups) or kind_misfit(x, weight, bias)
    if error is not None:
        raise ValueError(error)
    if min(output_size(x.shape[2:], weight.shape[2:], stride, padding)) < 1:
        raise ValueError(
            f"kernel {tuple(weight.shape[2:])}: larger than the input {tuple(x.shape[2:])} with its padding "
            f"{tuple(padding)} on both sides"
        )


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
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def as_format(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the dtype, and the strides, that `new_tensor(like, x.shape)` has, copied only where they differ."""
    return in_format(x, like.dtype, memory_format(like))


def in_format(x: Tensor, dtype: torch.dtype, form: torch.memory_format) -> Tensor:
    """`x` with a dtype, and the strides that a new tensor of the format has, copied only where they differ.

    `Tensor.contiguous` would not do: it leaves the strides of dimensions of size 1 as they are, and the
    operators promise the same strides as their fake kernels.
    """
    wanted = torch.empty(x.shape, device="meta", memory_format=form).stride()
    if x.stride() == wanted and x.dtype == dtype:
        return x
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=form).copy_(x)


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
