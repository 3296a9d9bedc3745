"""CC layers and images for the tests of this folder."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from timm_contconv.layers.cc import ContinuousConv2d, InternalNet

#: one scale for each way of computing
three_ways = pytest.mark.parametrize("scale", [0.5, 0.75, 0.61], ids=["strided", "interleaved", "features first"])


def build(scale=0.5, kernel_size=3, channels=(4, 6), **options) -> ContinuousConv2d:
    """A float64 layer with a kernel that is not symmetric, in eval mode."""
    layer = ContinuousConv2d(*channels, kernel_size, scale=scale, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        layer.net.weight.normal_()
        for value in layer.geometry.values():
            value.add_(torch.randn_like(value), alpha=0.05)
    return layer.eval()


def with_kernel(kernel: Callable[[Tensor], Tensor], channels: int, kernel_size: int, **options) -> ContinuousConv2d:
    """A depthwise float64 layer whose kernel is a product of `kernel` along rows and columns."""

    class Net(InternalNet):
        @staticmethod
        def function(rows: Tensor, columns: Tensor, **_: Tensor) -> Tensor:
            values = kernel(rows).unsqueeze(1) * kernel(columns)
            return torch.nn.functional.pad(values.unsqueeze(-1), (0, 1), value=1.0)

    layer = ContinuousConv2d(channels, channels, kernel_size, groups=channels, bias=False, **options)
    layer.net = Net(channels, 1, layer.net.plateaus, hidden=(1,), dtype=torch.float64)
    with torch.no_grad():
        for value in layer.geometry.values():
            value.zero_()
        layer.net.weight.copy_(torch.tensor([1.0, 0.0]).expand(channels, 1, 2))
    return layer.eval()


def images(*size: int, **factory) -> Tensor:
    return torch.randn(*(size or (2, 4, 12, 13)), **{"dtype": torch.float64, **factory})
