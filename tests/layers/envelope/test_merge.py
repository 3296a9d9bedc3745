"""Convolutions with a Gaussian envelope in place of plain ones, as plain ones, and what they cost."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_contconv.layers.envelope import EnvelopeSpec, GaussianEnvelopeConv2d

from .oracle import SETTINGS, build, images

settings = pytest.mark.parametrize("name", SETTINGS)


@settings
def test_plain_convolutions_have_the_same_output(name: str) -> None:
    layer, x = build(name), images()
    plain = layer.to_conv()
    assert {type(module) for module in plain} <= {nn.Conv2d, Conv2dSame}
    assert (plain.kernel_size, plain.stride, plain.padding) == (layer.kernel_size, layer.stride, layer.padding)
    torch.testing.assert_close(plain(x), layer(x))


@settings
def test_dense_convolution_has_the_same_output_at_least_in_the_interior(name: str) -> None:
    layer, x = build(name), images(2, 4, 24, 25)
    dense, y = layer.to_dense_conv(), layer(x)
    assert isinstance(dense, nn.Conv2d)
    rim = 0 if name in ("shortcut", "circular", "reflect") else 4
    inside = (..., slice(rim, y.shape[2] - rim), slice(rim, y.shape[3] - rim))
    torch.testing.assert_close(dense(x)[inside], y[inside])
    assert dense(x).shape == y.shape


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("arguments", [(3, 2, 1), (1, 2)])
def test_a_delta_is_one_plain_convolution(arguments: tuple[int, ...], order: str) -> None:
    layer, x = GaussianEnvelopeConv2d(4, 6, *arguments, order=order, initial_sigma=0), torch.randn(2, 4, 9, 10)
    plain = layer.to_conv()
    assert type(plain) is nn.Conv2d
    assert plain.stride == (2, 2)
    torch.testing.assert_close(plain(x), layer(x))


def test_dense_refuses_what_no_padding_can_place() -> None:
    with pytest.raises(ValueError, match=r"padding='same' with kernel_size=\(2, 2\) and stride=\(4, 4\)"):
        GaussianEnvelopeConv2d(4, 6, 2, 4, "same").to_dense_conv()


@pytest.mark.parametrize("conv", [{"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"padding": "same"}])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_layer_starts_as_the_convolution_that_it_replaces_and_goes_back(conv: dict, order: str) -> None:
    plain, x = nn.Conv2d(4, 6, 3, **conv), torch.randn(2, 4, 9, 10)
    layer = GaussianEnvelopeConv2d.from_conv(plain, EnvelopeSpec(order=order), fit_tolerance=1e-6)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    assert layer.fit_error(plain) < 1e-5
    torch.testing.assert_close(layer.to_conv_like(plain)(x), plain(x), rtol=1e-4, atol=1e-5)
    nn.init.zeros_(layer.raw_sigma)
    assert layer.to_conv_like(plain) is None


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("circular", "reflect")])
def test_multiply_adds_are_those_that_pytorch_counts(name: str) -> None:
    layer, x = build(name), images(1, 4, 12, 12)  # the largest image with an output of this size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = layer(x)
    assert counter.get_total_flops() == 2 * layer.multiply_adds(y.shape[2:])


@pytest.mark.parametrize("name", ["strided", "uneven", "dilated", "after", "shrunk"])
def test_receptive_field_is_where_the_gradient_is(name: str) -> None:
    layer, x = build(name), images(1, 4, 41, 41, requires_grad=True)
    y = layer(x)
    y[..., y.shape[2] // 2, y.shape[3] // 2].sum().backward()
    reached = x.grad.abs().sum((0, 1)) > 0
    assert layer.receptive_field() == (reached.any(1).sum(), reached.any(0).sum())
