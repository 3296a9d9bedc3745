"""The convolution engine for dense kernels."""

from .conv import conv, depthwise_conv, depthwise_conv1d, depthwise_conv2d, depthwise_conv3d
from .dense import fft_conv
from .dispatch import algorithm, algorithms
from .plain import is_transformed
from .problem import compute_dtype

__all__ = [
    "algorithm",
    "algorithms",
    "compute_dtype",
    "conv",
    "depthwise_conv",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv3d",
    "fft_conv",
    "is_transformed",
]
