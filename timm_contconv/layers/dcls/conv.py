"""DclsConv1d, 2d and 3d: convolutions with a `DclsKernel`."""

from __future__ import annotations

from ..core.kernel_conv import KernelConv1d, KernelConv2d, KernelConv3d
from .kernel import DclsSpec

__all__ = ["DclsConv1d", "DclsConv2d", "DclsConv3d"]


class DclsConv1d(KernelConv1d):
    """`nn.Conv1d` with a `DclsKernel`: takes the arguments of `KernelConv1d` and the settings of `DclsSpec`."""

    spec_class = DclsSpec


class DclsConv2d(KernelConv2d):
    """`nn.Conv2d` with a `DclsKernel`: takes the arguments of `KernelConv2d` and the settings of `DclsSpec`."""

    spec_class = DclsSpec


class DclsConv3d(KernelConv3d):
    """`nn.Conv3d` with a `DclsKernel`: takes the arguments of `KernelConv3d` and the settings of `DclsSpec`."""

    spec_class = DclsSpec


DclsSpec.layers = {1: DclsConv1d, 2: DclsConv2d, 3: DclsConv3d}
