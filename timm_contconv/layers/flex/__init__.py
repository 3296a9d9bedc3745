"""FlexConv (Romero et al. 2022): kernels that a small network generates and a Gaussian mask of learned size cuts out.

- magnet.py: the network, a function of controlled frequency.
- grid.py: the pixels that a kernel is sampled at, at any resolution.
- crop.py: which part of a masked kernel is not zero, so that only this part is convolved with.
- fit.py: networks that start as given kernels.
- formula.py: the kernel as a function of its parameters, network times mask.
- kernel.py: the kernel as a module, and its settings.
- conv.py: the layers.
- resolution.py: a whole model at another resolution.
"""

from .conv import FlexConv1d, FlexConv2d
from .formula import flex_kernel, gaussian_mask
from .kernel import FlexKernel, FlexSpec
from .magnet import MAGNet
from .resolution import at_resolution

__all__ = [
    "FlexConv1d",
    "FlexConv2d",
    "FlexKernel",
    "FlexSpec",
    "MAGNet",
    "at_resolution",
    "flex_kernel",
    "gaussian_mask",
]
