"""SmpConvBn2d: an SMP convolution and a small convolution side by side, each with its batch norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.compilation import CompileMode
from ..core.geometry import GeometryOwner
from ..core.plain import PlainConv, centred, plain_conv
from ..core.replacement import CONV_ATTRIBUTES, ConvReplacement
from ..core.shown import Quantity, ShownKernels
from ..core.tracing import as_node, is_traced
from .conv import SmpConv2d
from .kernel import SmpKernel, SmpSpec, small_kernel_sizes

__all__ = ["SmpConvBn2d"]


class SmpConvBn2d(ConvReplacement):
    """BN(SMP convolution) + BN(small convolution), which `to_conv` folds into one convolution.

    The re-parameterisation of RepLKNet, as SMPConv's ImageNet networks use it (Kim and Park 2023, section 3.3).

    Args:
        conv: the SMP convolution, without a small kernel of its own.
        small_kernel: size of the small convolution's kernel, as odd or even as the large one; None for none.

    Submodules: `conv`, `bn`, `small_conv` and `small_bn` (both None without small_kernel).

    Raises:
        ValueError: the small kernel does not fit at the centre of the large one, or its padding would be negative.
    """

    method = "smp"
    bias = None

    def __init__(self, conv: SmpConv2d, small_kernel: int | Sequence[int] | None = 5) -> None:
        super().__init__()
        assert isinstance(conv.kernel, SmpKernel)
        if conv.kernel.small_kernel is not None:
            raise ValueError(
                f"conv: has small_kernel={conv.kernel.small_kernel} without a batch norm; expected None; give"
                " small_kernel to SmpConvBn2d"
            )
        like: dict[str, Any] = {"device": conv.kernel.weight.device, "dtype": conv.kernel.weight.dtype}
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels, **like)
        sizes = small_kernel_sizes(small_kernel, conv.kernel_size)
        self.small_conv = None if sizes is None else _small_conv(conv, sizes, **like)
        self.small_bn = None if sizes is None else nn.BatchNorm2d(conv.out_channels, **like)
        for name in CONV_ATTRIBUTES:
            setattr(self, name, getattr(conv, name))

    @property
    def geometry_owner(self) -> GeometryOwner:
        return self.conv.kernel

    def compile_construction(self, mode: CompileMode) -> None:
        self.conv.compile_construction(mode)

    def forward(self, x: Tensor, shared: Sequence[Tensor] = ()) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W').

        `shared` is what torch.fx graphs pass, so that they hold shared geometry; it is not used.
        """
        if is_traced(x):
            return as_node(self, x)
        y = self.bn(self.conv(x))
        return y if self.small_conv is None or self.small_bn is None else y + self.small_bn(self.small_conv(x))

    @torch.no_grad()
    def to_conv(self) -> nn.Module:
        """One `nn.Conv2d` (or timm's `Conv2dSame`) with a bias and the output of this layer in eval mode."""
        conv = self.conv.to_conv()
        assert isinstance(conv, nn.Conv2d)
        weight, bias = _fold(conv.weight, conv.bias, self.bn)
        if self.small_conv is not None and self.small_bn is not None:
            small, small_bias = _fold(self.small_conv.weight, None, self.small_bn)
            weight, bias = weight + centred(small, weight.shape[2:]), bias + small_bias
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad=self.bn.bias.requires_grad)
        return conv.train(self.training)

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
        return cls(SmpConv2d.in_place_of(conv, branch), spec.small_kernel)

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv]) -> None:
        """The large branch fits the kernel, the small one starts at zero; in eval mode as exact as `SmpConv2d`."""
        SmpConv2d.fit_([layer.conv for layer in layers], convs)
        for layer in layers:
            if layer.small_conv is not None:
                layer.small_conv.weight.zero_()


def _small_conv(conv: SmpConv2d, sizes: Sequence[int], **like: Any) -> nn.Conv2d:
    """A convolution whose small kernel has the centre of `conv`'s kernel."""
    if conv.padding == "same":
        if max(conv.stride) > 1 or not all(size % 2 for size in sizes):
            raise ValueError("padding='same': expected pixels, because the small kernel has a stride or an even size")
        padding = tuple(size // 2 for size in sizes)
    else:
        assert not isinstance(conv.padding, str)
        both = zip(conv.padding, conv.kernel_size, sizes, strict=True)
        padding = tuple(p - (large - small) // 2 for p, large, small in both)
    if min(padding) < 0:
        raise ValueError(
            f"padding={conv.padding}: expected {-min(padding)} more, or a larger small_kernel; otherwise the small"
            " kernel would start inside the image"
        )
    weight = torch.empty(conv.out_channels, conv.in_channels // conv.groups, *sizes, **like)
    small = plain_conv(
        weight, None, stride=conv.stride, padding=padding, groups=conv.groups, padding_mode=conv.padding_mode
    )
    assert isinstance(small, nn.Conv2d)
    small.weight.requires_grad_(True)
    small.reset_parameters()
    return small


def _fold(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution followed by a batch norm with its running statistics."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    offset = -bn.running_mean if bias is None else bias - bn.running_mean
    return weight * scale.reshape(-1, 1, 1, 1), bn.bias + offset * scale
