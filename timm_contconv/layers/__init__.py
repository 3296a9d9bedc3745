"""Convolution layers, one file per method."""

from .base import ConstructedConv
from .dcls import DclsConv1d, DclsConv2d, DclsConv3d, DclsSpec
from .envelope import EnvelopeSpec, GaussianEnvelopeConv2d
from .replacement import ConvReplacement
from .smp import SmpConv1d, SmpConv2d, SmpSpec
from .smp_bn import SmpConvBn2d
from .spec import LayerSpec

__all__ = [
    "SPECS",
    "ConstructedConv",
    "ConvReplacement",
    "DclsConv1d",
    "DclsConv2d",
    "DclsConv3d",
    "GaussianEnvelopeConv2d",
    "SmpConv1d",
    "SmpConv2d",
    "SmpConvBn2d",
]

#: the settings of every method; recipes are validated against these
SPECS: tuple[type[LayerSpec], ...] = (DclsSpec, SmpSpec, EnvelopeSpec)
