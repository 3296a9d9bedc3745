"""An envelope layer starts as the convolution that it stands in for, with an envelope that can learn."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from timm_contconv.layers import GaussianEnvelopeConv2d
from timm_contconv.layers.envelope import EnvelopeSpec

from ...helpers import relative

SETTINGS = [{"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"padding": "same"}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_it_starts_as_near_to_the_convolution_as_it_is_told(settings, order):
    conv = nn.Conv2d(4, 6, 3, **settings)
    x = torch.randn(2, 4, 9, 10)
    for tolerance in (1e-5, 1e-2):
        layer = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(order=order), fit_tolerance=tolerance)
        assert relative(layer(x), conv(x)) < 2 * tolerance
        assert layer.fit_error(conv) < 0.51 * tolerance


def test_its_envelope_is_as_wide_as_half_of_the_tolerance_allows():
    conv = nn.Conv2d(4, 6, 3, stride=2)
    for tolerance in (0.001, 0.01, 0.1):
        layer = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(), fit_tolerance=tolerance)

        def excess(sigma, tolerance=tolerance):
            given = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(initial_sigma=sigma))
            return abs(given.fit_error(conv) - tolerance / 2)

        found = minimize_scalar(excess, bounds=(0.2, 1), method="bounded", options={"xatol": 1e-4}).x
        torch.testing.assert_close(layer.sigma, torch.full((4,), found, dtype=torch.float32), atol=2e-3, rtol=0)


def test_a_width_that_is_asked_for_stays_and_kernels_make_up_for_it():
    conv = nn.Conv2d(4, 6, 3)
    layer = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(initial_sigma=0.4))
    torch.testing.assert_close(layer.sigma, torch.full((4,), 0.4))
    copied = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(initial_sigma=0.4))
    copied.conv.weight.data.copy_(conv.weight)
    assert layer.fit_error(conv) < 0.7 * copied.fit_error(conv)


def test_sigma_moves_in_forty_steps_of_the_papers_sgd():
    """Learning rate 0.1, momentum 0.9. The targets come from wider envelopes."""
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    starts = {
        tolerance: GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(), fit_tolerance=tolerance)
        for tolerance in (0.01, 1e-6)
    }
    wide = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec())
    wide.conv.weight.data.copy_(conv.weight)
    wide.set_sigma_(1.0)
    moved = {}
    for tolerance, layer in starts.items():
        before = layer.sigma.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            x = torch.randn(16, 4, 12, 12, generator=generator)
            loss = (layer(x) - wide(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved[tolerance] = (layer.sigma.detach() - before).abs().mean()
    assert moved[0.01] > 0.005
    assert moved[1e-6] < 0.0005  # of an envelope that is nearly a delta
