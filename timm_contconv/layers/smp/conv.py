"""SmpConv1d and 2d: convolutions with an `SmpKernel`."""

from __future__ import annotations

from ..core.kernel_conv import KernelConv1d, KernelConv2d
from .kernel import SmpSpec

__all__ = ["SmpConv1d", "SmpConv2d"]


class SmpConv1d(KernelConv1d):
    """`nn.Conv1d` with an `SmpKernel`: takes the arguments of `KernelConv1d` and the settings of `SmpSpec`.

    The padding is "causal" by default.
    """

    spec_class = SmpSpec
    default_padding = "causal"


class SmpConv2d(KernelConv2d):
    """`nn.Conv2d` with an `SmpKernel`: takes the arguments of `KernelConv2d` and the settings of `SmpSpec`."""

    spec_class = SmpSpec


SmpSpec.layers = {1: SmpConv1d, 2: SmpConv2d}
