"""Dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2023): kernel elements that move.

A kernel is a sum of `kernel_count` elements. Each has a weight, a real-valued position and, for the triangle and
Gauss interpolations, a width; interpolation spreads it over the pixels around its position.

- formula.py: the kernel as a function of its parameters.
- fit.py: elements that start as given kernels.
- kernel.py: the kernel as a module, and its settings.
- conv.py: the layers.
"""

from .conv import DclsConv1d, DclsConv2d, DclsConv3d
from .formula import bilinear_kernel, gauss_kernel, repulsion, triangle_kernel
from .kernel import DclsKernel, DclsSpec

__all__ = [
    "DclsConv1d",
    "DclsConv2d",
    "DclsConv3d",
    "DclsKernel",
    "DclsSpec",
    "bilinear_kernel",
    "gauss_kernel",
    "repulsion",
    "triangle_kernel",
]
