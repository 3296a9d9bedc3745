"""Convolution with a learned Gaussian envelope (Kobayashi 2023): downsampling with a learned receptive field.

- gaussian.py: the filter as a function of its width.
- smoothing.py: the smoothing of images, and its gradients.
- spec.py: the settings.
- layer.py: the layer.
- fit.py: the envelope and the kernel that together approximate a given kernel.
- merge.py: the smoothing as plain convolutions, or folded into a larger kernel.
- model_wide.py: all envelopes of a model: their widths, and smaller filters.
"""

from .gaussian import envelope_filter
from .layer import GaussianEnvelopeConv2d
from .model_wide import shrink_envelopes, sigma_per_layer
from .smoothing import smooth
from .spec import EnvelopeSpec

__all__ = [
    "EnvelopeSpec",
    "GaussianEnvelopeConv2d",
    "envelope_filter",
    "shrink_envelopes",
    "sigma_per_layer",
    "smooth",
]
