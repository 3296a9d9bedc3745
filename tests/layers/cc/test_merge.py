"""From strided convolutions to CC layers and back, against the convolutions."""

import copy
import itertools
from fractions import Fraction

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F

from timm_contconv.layers.cc import CcSpec, ContinuousConv2d

from .builders import build, images

STRIDED = {
    "3x3/2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1x1/2": {"kernel_size": 1, "stride": 2},
    "7x7/2": {"kernel_size": 7, "stride": 2, "padding": 3},
    "2x2/2": {"kernel_size": 2, "stride": 2},
    "4x4/2": {"kernel_size": 4, "stride": 2, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x5/2x1": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    "depthwise": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
    "circular": {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
    "same": {"kernel_size": 3, "stride": 2, "same": True},
}
strided = pytest.mark.parametrize("name", STRIDED)


def plain(name: str) -> nn.Conv2d:
    settings = dict(STRIDED[name])
    return (Conv2dSame if settings.pop("same", False) else nn.Conv2d)(4, 8, **settings).eval()


@strided
def test_fit_reproduces_a_strided_convolution_at_even_and_odd_sizes(name: str) -> None:
    conv = plain(name)
    layer = ContinuousConv2d.from_conv(conv, CcSpec()).eval()
    assert layer.fit_error(conv) < 1e-6
    for size in ((16, 20), (15, 21), (17, 18)):
        x = torch.randn(2, 4, *size)
        expected = conv(x)
        assert layer(x).shape == expected.shape
        assert (layer(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(4, 4, 0), (7, 4, 3), (3, 3, 1), (1, 3, 0), (9, 8, 4)])
def test_fit_reproduces_larger_strides_at_their_multiples(kernel_size: int, stride: int, padding: int) -> None:
    conv = nn.Conv2d(3, 5, kernel_size, stride, padding)
    layer, x = ContinuousConv2d.from_conv(conv, CcSpec()).eval(), torch.randn(1, 3, 4 * stride, 5 * stride)
    assert (layer(x) - conv(x)).norm() <= 1e-5 * conv(x).norm()


def test_support_is_the_kernels_where_that_holds_the_pixels_and_no_larger_otherwise() -> None:
    sizes = {name: ContinuousConv2d.from_conv(plain(name), CcSpec()).kernel_size for name in ("3x3/2", "7x7/2", "same")}
    assert sizes == {"3x3/2": (3, 3), "7x7/2": (7, 7), "same": (4, 4)}
    patches = nn.Conv2d(3, 5, 7, 4, 3)
    assert ContinuousConv2d.from_conv(patches, CcSpec()).kernel_size == (9, 9)
    narrow = ContinuousConv2d.from_conv(patches, CcSpec(kernel_size=7))
    missed = patches.weight.detach().clone()
    missed[:, :, 1:, 1:] = 0  # the first row and column lie outside
    assert narrow.fit_error(patches) >= 0.9999 * float(missed.norm() / patches.weight.detach().norm())


def plain_same(size: int) -> nn.Conv2d:
    return Conv2dSame(4, 8, size, 2)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 8, 3, 2, 1), plain_same(3), plain_same(5)], ids=["pad", "same3", "same5"]
)
@pytest.mark.parametrize("support", range(3, 10))
def test_a_support_that_holds_the_pixels_is_exact_and_another_tells_its_error(conv: nn.Conv2d, support: int) -> None:
    layer = ContinuousConv2d.from_conv(conv, CcSpec(kernel_size=support)).eval()
    errors = []
    for size in ((16, 20), (15, 21), (17, 18)):
        x = torch.randn(2, 4, *size)
        errors.append(float((layer(x) - conv(x)).norm() / conv(x).norm()))
    covering = ContinuousConv2d.from_conv(conv, CcSpec()).kernel_size[0]
    if (support >= covering and (support - covering) % 2 == 0) or layer.fit_error(conv) < 1e-5:
        assert max(errors) < 1e-5
    else:
        assert layer.fit_error(conv) > 0.01


def test_too_few_features_give_the_least_error_and_say_so() -> None:
    conv, reports = plain("3x3/2"), {}
    for width in (2, 5, 100):
        torch.manual_seed(0)
        layer = ContinuousConv2d.from_conv(conv, CcSpec(hidden=(width,)))
        reports[width] = layer.fit_error(conv)
        even, odd = torch.tensor([1.5, 0.5, -0.5]), torch.tensor([1.0, 0.0, -1.0])  # sizes of the image
        kernels = [layer.kernel_at(rows, columns) for rows, columns in itertools.product((even, odd), repeat=2)]
        error = max(float((kernel - conv.weight).norm() / conv.weight.norm()) for kernel in kernels)
        assert reports[width] == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert reports[2] > reports[5] > reports[100]
    assert reports[100] < 1e-4


def test_fit_draws_nothing_and_random_does() -> None:
    conv = plain("3x3/2")
    one, two = (ContinuousConv2d.from_conv(conv, CcSpec(), init) for init in ("fit", "fit"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert ContinuousConv2d.from_conv(conv, CcSpec(), "random").fit_error(conv) > 0.5
    with pytest.raises(ValueError, match="meta device"):
        ContinuousConv2d.from_conv(copy.deepcopy(conv).to("meta"), CcSpec())


@strided
def test_a_drawn_layer_merges_and_a_fitted_one_gives_the_convolution_back(name: str) -> None:
    conv, x = plain(name), torch.randn(2, 4, 16, 20)
    layer = ContinuousConv2d.from_conv(conv, CcSpec(), "random").eval()
    merged = layer.to_conv()
    assert type(merged) in (nn.Conv2d, Conv2dSame)
    assert merged.weight.requires_grad
    assert not copy.deepcopy(layer).requires_grad_(False).to_conv().weight.requires_grad
    torch.testing.assert_close(merged(x), layer(x))
    assert merged(x[..., 1:, 1:]).shape == layer(x[..., 1:, 1:]).shape
    back = ContinuousConv2d.from_conv(conv, CcSpec()).to_conv_like(copy.deepcopy(conv).to("meta"))
    torch.testing.assert_close((back.weight, back.bias), (conv.weight, conv.bias))
    assert (type(back), back.stride, back.padding) == (type(conv), conv.stride, conv.padding)


@pytest.mark.parametrize("rounding", ["ceil", "floor", "round"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_kernels_of_every_size_have_a_plain_convolution(stride: int, rounding: str) -> None:
    x = images(1, 4, 4 * stride, 3 * stride)
    for support in range(1, 9):
        for mode in ("zeros", "circular"):
            layer = build(Fraction(1, stride), (support, 3), rounding=rounding, padding_mode=mode)
            torch.testing.assert_close(layer.to_conv()(x), layer(x))


def test_the_constructed_kernel_is_that_of_the_convolution() -> None:
    layer, x = build(0.5, 4), images(2, 4, 12, 14)
    torch.testing.assert_close(F.conv2d(x, layer.construct(), layer.bias, 2, 1), layer(x))
    offsets = torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=torch.float64)
    torch.testing.assert_close(layer.construct(), layer.kernel_at(offsets, offsets))
    torch.testing.assert_close(layer.weight_distances(), (offsets, offsets))


def test_other_scales_have_no_plain_convolution() -> None:
    with pytest.raises(ValueError, match="scale=61/100: expected 1/k"):
        build(0.61).to_conv()
    layer = ContinuousConv2d.from_conv(plain("3x3/2"), CcSpec())
    layer.scale = 1
    with pytest.raises(ValueError, match=r"scale=1: expected 1/stride, stride \(2, 2\)"):
        layer.to_conv_like(plain("3x3/2"))
    assert layer.unsaved_setting() == "scale=1, built with 1/2"
    layer.reset_setting()
    assert layer.unsaved_setting() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 40}, "kernel_size=40: expected at most 31"),
        ({"kernel_size": (3, 3, 3)}, "one int or one each for rows and columns"),
        ({"hidden": (5000,)}, "hidden.0=5000: expected at most 1024"),
        ({"scale": 0.5}, "scale is not a field of this layer"),
    ],
)
def test_recipes_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CcSpec.of(**settings)


def test_convolutions_with_outputs_of_other_sizes_are_refused() -> None:
    assert "its output has neither ceil nor floor" in CcSpec().refusal(nn.Conv2d(3, 4, 3, 2))
    assert CcSpec().refusal(nn.Conv1d(4, 4, 3, 2)) == "cc has no 1-D layer"
    assert "dilation" in CcSpec().refusal(nn.Conv2d(4, 4, 3, 2, 2, dilation=2))
    assert CcSpec().refusal(nn.Conv2d(4, 4, 3, 2, 1)) is None
