"""Convolution layers, one file per method."""

from .base import ConstructedConv
from .cc import CcSpec, ContinuousConv2d
from .dcls import DclsConv1d, DclsConv2d, DclsConv3d, DclsSpec
from .envelope import EnvelopeSpec, GaussianEnvelopeConv2d
from .flex import FlexConv1d, FlexConv2d, FlexSpec
from .magnet import MAGNet
from .replacement import ConvReplacement
from .smp import SmpConv1d, SmpConv2d, SmpSpec
from .smp_bn import SmpConvBn2d
from .spec import LayerSpec

__all__ = [
    "SPECS",
    "ConstructedConv",
    "ContinuousConv2d",
    "ConvReplacement",
    "DclsConv1d",
    "DclsConv2d",
    "DclsConv3d",
    "FlexConv1d",
    "FlexConv2d",
    "GaussianEnvelopeConv2d",
    "MAGNet",
    "SmpConv1d",
    "SmpConv2d",
    "SmpConvBn2d",
]

#: the settings of every method; recipes are validated against these
SPECS: tuple[type[LayerSpec], ...] = (DclsSpec, SmpSpec, EnvelopeSpec, FlexSpec, CcSpec)
