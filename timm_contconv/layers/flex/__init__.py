"""FlexConv (Romero et al. 2022): a small network generates the kernel, and a Gaussian mask learns its size.

- magnet.py: the network, a function of controlled frequency.
- nets.py: the kinds of networks: MAGNets, and those that the paper compares them with.
- grid.py: the pixels at which a kernel is sampled, at any resolution.
- crop.py: the part of a masked kernel that is not zero; only this part is used in the convolution.
- fit.py: networks that start as given kernels.
- formula.py: the kernel as a function of its parameters, network times mask.
- kernel.py: the kernel as a module, and its settings.
- conv.py: the layers, and one crop for all layers of a model.
- resolution.py: a whole model at another resolution.
"""

from .conv import FlexConv1d, FlexConv2d, crop_alike_
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
    "crop_alike_",
    "flex_kernel",
    "gaussian_mask",
]
