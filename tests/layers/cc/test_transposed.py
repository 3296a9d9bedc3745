"""CC layers that upscale in place of transposed convolutions, and back."""

import re

import pytest
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers.cc import CcSpec, ContinuousConv2d

from ...helpers import relative

#: kernel size, stride, padding, output padding, groups
CONVOLUTIONS = [
    (2, 2, 0, 0, 1),
    (4, 2, 1, 0, 2),
    (3, 2, 1, 1, 1),
    (3, 3, 0, 0, 1),
    (5, 3, 1, 0, 4),
    (8, 4, 2, 0, 1),
    ((4, 3), (2, 3), (1, 0), 0, 1),
    ((3, 2), (1, 2), (1, 0), 0, 2),
]


def convolution(size, stride, padding, more, groups, **options) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(4, 8, size, stride, padding, more, groups, **options)


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_layer_starts_as_a_transposed_convolution_and_merges_to_one(settings):
    conv = convolution(*settings, dtype=torch.float64)
    layer = ContinuousConv2d.from_conv(conv, CcSpec())
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-9, rtol=1e-9)
    assert layer.fit_error(conv) < 1e-9
    merged = layer.to_conv()
    assert type(merged) is nn.ConvTranspose2d
    torch.testing.assert_close(merged(x), layer(x), atol=1e-9, rtol=1e-9)
    restored = layer.to_conv_like(conv)
    torch.testing.assert_close(restored.weight, conv.weight, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(restored(x), conv(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("scale", "support"), [(2, 3), (3, 2), ((2, 3), (1, 4)), (5, 3), ((1, 2), (3, 3))])
def test_a_layer_of_any_support_merges(scale, support):
    layer = ContinuousConv2d(3, 6, support, scale=scale, groups=3, hidden=(8,), dtype=torch.float64)
    x = torch.randn(1, 3, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.to_conv()(x), layer(x), atol=1e-9, rtol=1e-9)


class Decoder(nn.Module):
    """Three steps up, one of which no CC layer can do."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(4, 8, 2, 2)
        self.up2 = nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)
        self.odd = nn.ConvTranspose2d(8, 3, 3, 2)
        self.last = nn.Conv2d(3, 3, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.odd(self.up2(self.up1(x).relu()).relu()))


def test_the_recipe_upscales_a_decoder_and_keeps_its_function():
    model, x = Decoder().eval(), torch.randn(2, 4, 6, 5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    tcc.patch(model, "cc_up")
    report = tcc.report(model, input_size=(4, 6, 5))
    assert isinstance(model.up1, ContinuousConv2d)
    assert type(model.last) is nn.Conv2d
    assert report.refused.keys() == {"odd"}
    assert "its output is not stride times as large as its input" in report.refused["odd"]
    assert [row.fit_error < 1e-5 for row in report.rows] == [True, True]
    assert report.multiply_adds_after == report.multiply_adds_before
    assert relative(model(x), expected) < 1e-5
    assert relative(tcc.merge(model)(x), expected) < 1e-5
    model.up1.scale = 1.5  # what a transposed convolution can't do
    assert model.up1(x).shape == (2, 8, 9, 8)
    model.up1.scale = 2
    tcc.unpatch(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-5, rtol=1e-4)


def test_a_decoder_trains_and_a_smaller_support_is_reported():
    model = tcc.patch(Decoder(), "cc_up", kernel_size=1)
    assert 0.1 < max(row.fit_error for row in tcc.report(model).rows) < 1
    model(torch.randn(2, 4, 6, 5)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.up1.parameters())


def test_other_methods_and_other_selections_leave_transposed_convolutions_alone():
    assert tcc.report(tcc.patch(Decoder(), "cc")).refused == {}
    refused = tcc.report(tcc.patch(Decoder(), "genv", select="all")).refused
    assert refused == dict.fromkeys(("up1", "up2", "odd"), "transposed convolution")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 1, "kernel_size": 3, "padding": 1}, r"stride=\(1, 1\): expected more"),
        ({"stride": 2, "kernel_size": 3}, "its output is not stride times as large"),
        ({"stride": 2, "kernel_size": 2, "dilation": 2}, r"dilation \(2, 2\)"),
    ],
)
def test_convolutions_that_are_no_upscaling_are_refused(options, message):
    assert re.search(message, CcSpec().refusal(nn.ConvTranspose2d(2, 2, **options)))


def test_a_net_per_phase_takes_an_integer_scale():
    with pytest.raises(ValueError, match="per_phase=True, scale=1/2: expected an integer scale above 1"):
        ContinuousConv2d(2, 2, 3, 2, per_phase=True)
