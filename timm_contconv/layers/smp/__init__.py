"""SMPConv (Kim and Park 2023): kernels interpolated between self-moving points.

A kernel is a function over [-1, 1] per dimension. A point's influence falls linearly with the L1 distance, from its
weight at its coordinates to 0 at its radius. Points move freely in training.

- formula.py: the kernel as a function of its parameters.
- fit.py: points that start as given kernels.
- kernel.py: the kernel as a module, and its settings.
- conv.py: the layers.
- conv_bn.py: a layer and a small convolution side by side, each with its batch norm.
"""

from .conv import SmpConv1d, SmpConv2d
from .conv_bn import SmpConvBn1d, SmpConvBn2d
from .formula import point_basis, smp_kernel, smp_sum_kernel
from .kernel import SmpKernel, SmpSpec

__all__ = [
    "SmpConv1d",
    "SmpConv2d",
    "SmpConvBn1d",
    "SmpConvBn2d",
    "SmpKernel",
    "SmpSpec",
    "point_basis",
    "smp_kernel",
    "smp_sum_kernel",
]
