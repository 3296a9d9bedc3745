"""Convolution layers, one package per method; `core` holds what they share."""

from .cc import ContinuousConv2d, InternalNet
from .core.kernel import Kernel
from .core.kernel_conv import KernelConv, KernelConv1d, KernelConv2d, KernelConv3d
from .core.replacement import ConvReplacement
from .core.spec import METHODS, KernelSpec, LayerSpec
from .dcls import DclsConv1d, DclsConv2d, DclsConv3d, DclsKernel
from .engine import DepthwiseConv2d
from .envelope import GaussianEnvelopeConv2d
from .flex import FlexConv1d, FlexConv2d, FlexKernel, MAGNet
from .smp import SmpConv1d, SmpConv2d, SmpConvBn1d, SmpConvBn2d, SmpKernel

__all__ = [
    "METHODS",
    "ContinuousConv2d",
    "ConvReplacement",
    "DclsConv1d",
    "DclsConv2d",
    "DclsConv3d",
    "DclsKernel",
    "DepthwiseConv2d",
    "FlexConv1d",
    "FlexConv2d",
    "FlexKernel",
    "GaussianEnvelopeConv2d",
    "InternalNet",
    "Kernel",
    "KernelConv",
    "KernelConv1d",
    "KernelConv2d",
    "KernelConv3d",
    "KernelSpec",
    "LayerSpec",
    "MAGNet",
    "SmpConv1d",
    "SmpConv2d",
    "SmpConvBn1d",
    "SmpConvBn2d",
    "SmpKernel",
]
