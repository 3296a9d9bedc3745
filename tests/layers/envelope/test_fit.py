"""An envelope layer starts as the convolution that it stands in for."""

import pytest
import torch
from torch import nn

from timm_contconv.layers import GaussianEnvelopeConv2d
from timm_contconv.layers.envelope import EnvelopeSpec

from ...helpers import relative


@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"padding": "same"}])
@pytest.mark.parametrize("order", ["before", "after"])
def test_it_starts_as_the_convolution_alone(settings, order):
    conv = nn.Conv2d(4, 6, 3, **settings)
    layer = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(order=order))
    x = torch.randn(2, 4, 9, 10)
    assert relative(layer(x), conv(x)) < 1e-5
    assert layer.fit_error(conv) < 1e-5


def test_a_width_that_is_asked_for_is_not_fitted():
    layer = GaussianEnvelopeConv2d.from_conv(nn.Conv2d(4, 6, 3), EnvelopeSpec(initial_sigma=0.5))
    torch.testing.assert_close(layer.sigma, torch.full((4,), 0.5))
