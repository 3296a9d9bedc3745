"""ConstructedConv: what every convolution whose kernel is constructed from parameters has in common.

A subclass gives a pure kernel function and the parameters that it takes. This class owns the rest: the
arguments and attributes of `nn.Conv2d`, when the kernel is constructed and when it is kept, padding, and the
way to and from plain convolutions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import conv as convolve
from ..ops.problem import compute_dtype
from .arguments import check_channels, check_padding, per_dimension
from .compilation import CompileMode, check_compile_mode, construct_compiled, should_compile
from .kept import KeptKernel, any_requires_grad, may_keep, to_be_kept
from .once import interpolation_of
from .replacement import ConvReplacement, PlainConv

__all__ = ["ConstructedConv", "plain_arguments", "without_autocast"]

torch.fx.wrap("convolve")  # the engine chooses by shape, which symbolic tracing does not know

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
PLAIN_CONVS: dict[int, type[PlainConv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConstructedConv(ConvReplacement):
    """A convolution whose dense kernel is a function of other parameters.

    Args:
        in_channels: C_in, a multiple of `groups`.
        out_channels: C_out, a multiple of `groups`.
        kernel_size: size of the constructed kernel, in pixels; an int or one per spatial dimension.
        stride: step of the convolution, in pixels.
        padding: pixels added on both sides, "valid" (none) or "same" (output size = ceil(input / stride); for
            stride 1 this is PyTorch's "same", for larger strides timm's `Conv2dSame`).
        dilation: only 1; a larger kernel_size serves the same purpose with learnable positions.
        groups: blocked connections from input to output channels.
        bias: adds a learnable bias of shape (C_out,).
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        compile: "auto" compiles the kernel construction on CUDA and stays eager on the CPU, True compiles
            everywhere, False nowhere.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.
    """

    ndim: ClassVar[int]

    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        compile: CompileMode = "auto",
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={padding_mode!r}: expected one of {', '.join(PADDING_MODES)}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_dimension("kernel_size", kernel_size, self.ndim, minimum=1)
        self.stride = per_dimension("stride", stride, self.ndim, minimum=1)
        self.padding = check_padding(padding, self.ndim)
        self.dilation = per_dimension("dilation", dilation, self.ndim, minimum=1)
        if max(self.dilation) > 1:
            raise ValueError(
                f"dilation={dilation!r}: expected 1; a constructed kernel reaches further with a larger kernel_size"
            )
        self.groups = groups
        self.padding_mode = padding_mode
        self.output_padding = (0,) * self.ndim
        self.compile_mode = check_compile_mode(compile)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self._kept: KeptKernel | None = None

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the method's paper does."""

    @abstractmethod
    def kernel_function(self) -> Callable[..., Tensor]:
        """A pure function from `kernel_inputs()` (as keywords) to (C_out, C_in/groups, *kernel_size)."""

    @abstractmethod
    def kernel_inputs(self) -> Mapping[str, Tensor]:
        """The parameters that the kernel is constructed from, by argument name of `kernel_function()`."""

    def interpolation_function(self) -> Callable[..., dict[str, Tensor]] | None:
        """A pure function from the geometry to what layers that share it can share, None where that is nothing."""
        return None

    def interpolated_kernel_function(self) -> Callable[..., Tensor]:
        """`kernel_function()` of the inputs other than the geometry and of what `interpolation_function()` gave."""
        raise NotImplementedError(f"{type(self).__name__} has no interpolation_function")

    def interpolate(self) -> dict[str, Tensor] | None:
        """What `interpolation_function` computes from this layer's geometry; None where there is no such function."""
        function = self.interpolation_function()
        geometry = dict(self.geometry.items())
        if function is None or not all(isinstance(value, Tensor) for value in geometry.values()):  # torch.fx
            return None
        return self._computed(function, geometry)

    def construct(self) -> Tensor:
        """Construct the dense kernel.

        Computed in float32 (float64 if the parameters are float64), also under autocast, then cast to the
        parameters' dtype.

        Returns:
            (C_out, C_in/groups, *kernel_size), differentiable with respect to the parameters.
        """
        inputs = dict(self.kernel_inputs())
        function = self.kernel_function()
        interpolation = interpolation_of(self)
        if interpolation is not None:
            function = self.interpolated_kernel_function()
            inputs = {key: value for key, value in inputs.items() if key not in self.geometry} | interpolation
        return self._computed(function, inputs).to(next(self.parameters()).dtype)

    def _computed(self, function: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
        """The function in the precision of kernel construction, compiled where that is wanted."""
        reference = next(self.parameters())  # not out of inputs: under torch.fx those are proxies
        exact = compute_dtype(reference.dtype)
        with without_autocast(reference.device.type):
            arguments = {name: value.to(exact) for name, value in inputs.items()}
            if should_compile(self.compile_mode, reference.device):
                return construct_compiled(function, arguments)
            return function(**arguments)

    @property
    def weight(self) -> Tensor:
        """The dense kernel, (C_out, C_in/groups, *kernel_size): what `nn.Conv2d.weight` would hold.

        Outside training and without gradients it is constructed once and kept while the parameters are equal to
        those that it was constructed from; otherwise every access constructs it.
        """
        inputs = self.kernel_inputs()
        if self.training or not may_keep(inputs.values()):
            return self.construct()
        if self._kept is None or not self._kept.is_current(inputs):
            with to_be_kept():
                self._kept = KeptKernel.of(inputs, self.construct())
        return self._kept.kernel

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise AttributeError("weight: it is constructed and can't be set; to_conv() gives a layer where it can")
        super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, (N, C_in, *size) or (C_in, *size), with the constructed kernel."""
        x, padding = self._pad(x)
        return convolve(x, self.weight, self.bias, self.stride, padding, self.groups)

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Pad what the convolution itself can't (other modes than zeros, uneven sides); the rest is returned."""
        none = (0,) * self.ndim
        if isinstance(self.padding, tuple):
            if self.padding_mode == "zeros":
                return x, self.padding
            sides = [(p, p) for p in self.padding]
        elif self.padding_mode == "zeros" and all(
            s == 1 and k % 2 for s, k in zip(self.stride, self.kernel_size, strict=True)
        ):
            return x, tuple(k // 2 for k in self.kernel_size)
        else:
            return _pad_same(x, self.kernel_size, self.stride, self.padding_mode), none
        return _pad_sides(x, sides, self.padding_mode), none

    def to_conv(self) -> nn.Module:
        """The plain convolution (`nn.Conv1d/2d/3d`, or timm's `Conv2dSame`) with the same output."""
        kernel = self.construct().detach()
        shared = {"groups": self.groups, "bias": self.bias is not None, "device": "meta"}
        if self.padding == "same" and max(self.stride) > 1:
            if self.ndim != 2 or self.padding_mode != "zeros":
                raise ValueError(
                    f"padding='same' with stride={self.stride} and padding_mode={self.padding_mode!r}: no plain"
                    f" {self.ndim}-D convolution has it"
                )
            conv: PlainConv = Conv2dSame(self.in_channels, self.out_channels, self.kernel_size, self.stride, **shared)
        else:
            conv = PLAIN_CONVS[self.ndim](
                self.in_channels,
                self.out_channels,
                self.kernel_size,  # type: ignore[arg-type]
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                padding_mode=self.padding_mode,  # type: ignore[arg-type]
                **shared,  # type: ignore[arg-type]
            )
        conv.weight = nn.Parameter(kernel.clone(), requires_grad=any_requires_grad(self.kernel_inputs().values()))
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds of the convolution for one sample with an output of `output_size` pixels."""
        return (
            math.prod(output_size) * self.out_channels * self.in_channels // self.groups * math.prod(self.kernel_size)
        )

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._kept = None  # its memory is of no use during training
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0,) * self.ndim:
            text += f", padding={self.padding!r}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text


def plain_arguments(conv: PlainConv, kernel_size: Sequence[int]) -> dict[str, Any]:
    """Constructor arguments for a layer of another kernel size that stands in for `conv`.

    The padding grows with the kernel, so that the output keeps its size and its place.

    Raises:
        ValueError: a kernel of this parity can't be centred where the old one was.
    """
    padding: str | tuple[int, ...]
    if isinstance(conv, Conv2dSame) or conv.padding == "same":
        padding = "same"
    else:
        old: Sequence[int] = (0,) * len(kernel_size) if isinstance(conv.padding, str) else conv.padding
        growth = [new - now for new, now in zip(kernel_size, conv.kernel_size, strict=True)]
        padding = tuple(p + g // 2 for p, g in zip(old, growth, strict=True))
        if any(g % 2 for g in growth) or min(padding) < 0:
            raise ValueError(
                f"kernel_size={tuple(kernel_size)} can't be centred on a {conv.kernel_size} kernel with"
                f" padding={conv.padding!r}: the sizes must differ by an even number and the padding stay at least 0"
            )
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": tuple(kernel_size),
        "stride": conv.stride,
        "padding": padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which operators keep the dtype of their arguments."""
    if not torch.amp.is_autocast_available(device_type):  # the meta device
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@torch.fx.wrap
def _pad_same(x: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], padding_mode: str) -> Tensor:
    """So that the output has ceil(input / stride) pixels; sizes are known when a traced module runs."""
    sizes = x.shape[-len(kernel_size) :]
    return _pad_sides(x, [_same_sides(*d) for d in zip(sizes, kernel_size, stride, strict=True)], padding_mode)


def _pad_sides(x: Tensor, sides: Sequence[tuple[int, int]], padding_mode: str) -> Tensor:
    amounts = [amount for side in reversed(sides) for amount in side]
    return F.pad(x, amounts, mode="constant" if padding_mode == "zeros" else padding_mode)


def _same_sides(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
