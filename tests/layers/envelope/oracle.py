"""Layers to try, and SciPy's correlation to compare them with."""

import numpy as np
import torch
from scipy import ndimage, special
from torch import nn
from torch.nn import functional as F

from timm_contconv.layers.envelope import GaussianEnvelopeConv2d

SCIPY_MODES = {"zeros": "constant", "reflect": "mirror", "replicate": "nearest", "circular": "wrap"}
SETTINGS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "shortcut": {"kernel_size": 1, "stride": 2},
    "uneven": {"kernel_size": (3, 1), "padding": (1, 0), "stride": (1, 2)},
    "grouped": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "stride": 2},
    "circular": {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "after": {"kernel_size": 3, "padding": 1, "stride": 2, "order": "after"},
    "after shortcut": {"kernel_size": 1, "stride": 2, "order": "after"},
    "one sigma": {"kernel_size": 3, "padding": 1, "stride": 2, "sigma_per": "layer"},
    "shrunk": {"kernel_size": 3, "padding": 1, "stride": 2, "inference_size": 3},
}


def build(name: str = "strided", **changes) -> GaussianEnvelopeConv2d:
    """A float64 layer from 4 to 6 channels with a different sigma in every channel, in eval mode."""
    layer = GaussianEnvelopeConv2d(4, 6, **{"envelope_size": 5, "dtype": torch.float64, **SETTINGS[name], **changes})
    nn.init.normal_(layer.raw_sigma)
    return layer.eval()


def images(*size: int, **factory) -> torch.Tensor:
    return torch.randn(*(size or (2, 4, 12, 13)), **{"dtype": torch.float64, **factory})


def scipy_filter(sigma: float, size: int) -> np.ndarray:
    offsets = np.arange(size) - size // 2
    return special.softmax(-(offsets**2) / (2 * sigma**2))


def scipy_smooth(x: torch.Tensor, sigma: torch.Tensor, size: int, mode: str = "zeros") -> torch.Tensor:
    """x, (N, C, H, W), smoothed channel by channel along both axes by SciPy."""
    y = x.detach().numpy().copy()
    for channel, width in enumerate(sigma.detach().expand(x.shape[1]).tolist()):
        for axis in (1, 2):
            taps = scipy_filter(width, size)
            y[:, channel] = ndimage.correlate1d(y[:, channel], taps, axis, mode=SCIPY_MODES[mode], cval=0.0)
    return torch.from_numpy(y)


def scipy_layer(layer: GaussianEnvelopeConv2d, x: torch.Tensor) -> torch.Tensor:
    """The output of a layer with zeros beyond the border, smoothed by SciPy."""
    size = layer.spec.taps(layer.training)
    arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.spec.order == "before":
        return F.conv2d(scipy_smooth(x, layer.sigma, size), layer.conv.weight, layer.bias, *arguments)
    smoothed = scipy_smooth(F.conv2d(x, layer.conv.weight, None, *arguments), layer.sigma, size)
    return smoothed + layer.bias.view(-1, 1, 1)
