"""Convolution layers, one file or package per method; what they share is in `core`."""

from .core.kernel import Kernel
from .core.kernel_conv import KernelConv, KernelConv1d, KernelConv2d, KernelConv3d
from .core.replacement import ConvReplacement
from .core.spec import METHODS, KernelSpec, LayerSpec
from .dcls import DclsConv1d, DclsConv2d, DclsConv3d, DclsKernel
from .smp import SmpConv1d, SmpConv2d, SmpConvBn2d, SmpKernel

__all__ = [
    "METHODS",
    "ConvReplacement",
    "DclsConv1d",
    "DclsConv2d",
    "DclsConv3d",
    "DclsKernel",
    "Kernel",
    "KernelConv",
    "KernelConv1d",
    "KernelConv2d",
    "KernelConv3d",
    "KernelSpec",
    "LayerSpec",
    "SmpConv1d",
    "SmpConv2d",
    "SmpConvBn2d",
    "SmpKernel",
]
