"""SmpConvBn1d and 2d: an SMP convolution and a small convolution side by side, each with its batch norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.compilation import CompileMode
from ..core.geometry import GeometryOwner
from ..core.plain import PlainConv
from ..core.replacement import CONV_ATTRIBUTES, FIT_TOLERANCE, ConvReplacement
from ..core.shown import Quantity, ShownKernels
from ..core.subnormals import without_subnormals
from ..core.tracing import as_node, is_traced
from .conv import SmpConv1d, SmpConv2d
from .kernel import SmpKernel, SmpSpec, placed, small_kernel_sizes

__all__ = ["SmpConvBn1d", "SmpConvBn2d"]

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


class SmpConvBn(ConvReplacement):
    """BN(SMP convolution) + BN(small convolution), which `to_conv` folds into one convolution.

    The re-parameterisation of RepLKNet, as SMPConv's networks use it (Kim and Park 2023, section 3.3).

    Args:
        conv: the SMP convolution, without a small kernel of its own.
        small_kernel: size of the small convolution's kernel; None for none. It is as odd or even as the large one, so
            that both have one centre. With causal padding any size fits, because both end at the newest sample.
        small_bias: adds a bias to the small convolution, as some released networks have it.

    Submodules: `conv`, `bn`, `small_conv` and `small_bn` (both None without small_kernel).

    Raises:
        ValueError: the small kernel does not fit into the large one, or its padding would be negative.
    """

    method = "smp"
    bias = None
    #: the SMP convolution, the small one and the norm of these dimensions
    conv_class: ClassVar[type[SmpConv1d | SmpConv2d]]
    plain_class: ClassVar[Callable[..., PlainConv]]
    norm_class: ClassVar[type[BatchNorm]]

    def __init__(
        self, conv: SmpConv1d | SmpConv2d, small_kernel: int | Sequence[int] | None = 5, small_bias: bool = False
    ) -> None:
        super().__init__()
        assert isinstance(conv.kernel, SmpKernel)
        if conv.kernel.small_kernel is not None:
            raise ValueError(
                f"conv: has small_kernel={conv.kernel.small_kernel} without a batch norm; expected None; give"
                f" small_kernel to {type(self).__name__}"
            )
        if max(conv.dilation) > 1:
            raise ValueError(f"conv: has dilation={conv.dilation}; expected 1")
        like: dict[str, Any] = {"device": conv.kernel.weight.device, "dtype": conv.kernel.weight.dtype}
        self.conv = conv
        self.bn = self.norm_class(conv.out_channels, **like)
        sizes = small_kernel_sizes(small_kernel, conv.kernel_size, conv.kernel.causal)
        self.small_conv: PlainConv | None = None
        self.small_bn: BatchNorm | None = None
        if sizes is not None:
            self.small_conv = self.plain_class(
                conv.in_channels, conv.out_channels, sizes, conv.stride, _small_padding(conv, sizes),
                groups=conv.groups, bias=small_bias, padding_mode=conv.padding_mode, **like,
            )  # fmt: skip
            self.small_bn = self.norm_class(conv.out_channels, **like)
        for name in CONV_ATTRIBUTES:
            setattr(self, name, getattr(conv, name))

    @property
    def geometry_owner(self) -> GeometryOwner:
        return self.conv.kernel

    def compile_construction(self, mode: CompileMode) -> None:
        self.conv.compile_construction(mode)

    def forward(self, x: Tensor, shared: Sequence[Tensor] = ()) -> Tensor:
        """(N, C_in, *size) to (N, C_out, *size').

        `shared` is what torch.fx graphs pass, so that they hold shared geometry; it is not used.
        """
        if is_traced(x):
            return as_node(self, x)
        y = self.bn(self.conv(x))
        if self.small_conv is None or self.small_bn is None:
            return y
        if self.padding == "causal":
            x = F.pad(x, (self.small_conv.kernel_size[0] - 1, 0))
        return y + self.small_bn(self.small_conv(x))

    @torch.no_grad()
    def to_conv(self) -> nn.Module:
        """The plain convolution with a bias and the output of this layer in eval mode, as `conv.to_conv` gives it."""
        merged = self.conv.to_conv()
        conv = merged[-1] if isinstance(merged, nn.Sequential) else merged
        assert isinstance(conv, PlainConv)
        weight, bias = _fold(conv, self.bn)
        if self.small_conv is not None and self.small_bn is not None:
            small, small_bias = _fold(self.small_conv, self.small_bn)
            weight = weight + placed(small, weight.shape[2:], self.padding == "causal")
            bias = bias + small_bias
        conv.weight = nn.Parameter(without_subnormals(weight), requires_grad=conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad=self.bn.bias.requires_grad)
        return merged.train(self.training)

    def shown_kernels(self) -> ShownKernels:
        """The folded kernels of both branches, with the points of the large one."""
        return dataclasses.replace(super().shown_kernels(), elements=self.conv.kernel.shown_elements())

    def shown_quantities(self) -> tuple[Quantity, ...]:
        return self.conv.shown_quantities()

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        total = self.conv.multiply_adds(output_size)
        if self.small_conv is not None:
            total += torch.Size(output_size).numel() * self.small_conv.weight.numel()
        return total

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: SmpSpec) -> Self:
        """Both branches in place of `conv`; the small one has the spec's small_kernel."""
        branch = spec.model_copy(update={"small_kernel": None})
        return cls(cls.conv_class.in_place_of(conv, branch), spec.small_kernel)

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv], tolerance: float = FIT_TOLERANCE) -> None:
        """The large branch fits the kernel, the small one starts at zero; in eval mode as exact as the large one."""
        large: Any = [layer.conv for layer in layers]
        cls.conv_class.fit_(large, convs, tolerance)
        for layer in layers:
            if layer.small_conv is not None:
                for parameter in layer.small_conv.parameters():
                    parameter.zero_()


class SmpConvBn1d(SmpConvBn):
    __doc__ = SmpConvBn.__doc__
    ndim, conv_class, plain_class, norm_class = 1, SmpConv1d, nn.Conv1d, nn.BatchNorm1d


class SmpConvBn2d(SmpConvBn):
    __doc__ = SmpConvBn.__doc__
    conv_class, plain_class, norm_class = SmpConv2d, nn.Conv2d, nn.BatchNorm2d


def _small_padding(conv: SmpConv1d | SmpConv2d, sizes: Sequence[int]) -> tuple[int, ...]:
    """With it a small kernel has the centre of `conv`'s kernel; none with causal padding, which `forward` adds."""
    if conv.padding == "causal":
        return (0,)
    if conv.padding == "same":
        if max(conv.stride) > 1 or not all(size % 2 for size in sizes):
            raise ValueError("padding='same': expected pixels, because the small kernel has a stride or an even size")
        return tuple(size // 2 for size in sizes)
    assert not isinstance(conv.padding, str)
    both = zip(conv.padding, conv.kernel_size, sizes, strict=True)
    padding = tuple(p - (large - small) // 2 for p, large, small in both)
    if min(padding) < 0:
        raise ValueError(
            f"padding={conv.padding}: expected {-min(padding)} more, or a larger small_kernel; otherwise the small"
            " kernel would start inside the image"
        )
    return padding


def _fold(conv: PlainConv, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution followed by a batch norm with its running statistics."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    offset = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
    return conv.weight * scale.reshape(-1, *(1,) * (conv.weight.ndim - 1)), bn.bias + offset * scale
