"""Convolutions with a Gaussian envelope, against SciPy, autograd and plain convolutions."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_contconv.layers.envelope import EnvelopeSpec, GaussianEnvelopeConv2d

from .oracle import SETTINGS, build, images, scipy_layer

settings = pytest.mark.parametrize("name", SETTINGS)
inside_and_at_the_entrance = pytest.mark.parametrize("needs_gradient", [True, False], ids=["inside", "entrance"])


@inside_and_at_the_entrance
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("same", "circular", "reflect")])
def test_output_is_scipys_smoothing_and_a_convolution(name: str, needs_gradient: bool) -> None:
    layer, x = build(name), images(requires_grad=needs_gradient)
    expected = scipy_layer(layer, x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])


# Derivatives


@inside_and_at_the_entrance
@pytest.mark.parametrize("name", ["shortcut", "grouped", "dilated", "same", "circular", "after", "one sigma"])
def test_derivatives_are_right_inside_a_network_and_at_its_entrance(name: str, needs_gradient: bool) -> None:
    layer, x = build(name).train(), images(1, 4, 5, 6, requires_grad=needs_gradient)
    names, values = zip(*layer.named_parameters(), strict=True)
    run = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, *values), fast_mode=True)


def test_gradients_per_sample_come_from_vmap() -> None:
    layer, x = build(), images(3, 4, 6, 6)
    parameters = dict(layer.named_parameters())
    loss = lambda p, x: torch.func.functional_call(layer, p, (x[None],)).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["raw_sigma"]
    (expected,) = torch.autograd.grad(layer(x[1:2]).square().sum(), layer.raw_sigma)
    torch.testing.assert_close(per_sample[1], expected)


# Parameters


@pytest.mark.parametrize(("order", "bias", "channels"), [("before", "conv.bias", 4), ("after", "bias", 6)])
def test_parameters_start_as_in_a_plain_convolution_and_the_paper(order: str, bias: str, channels: int) -> None:
    torch.manual_seed(1)
    layer = GaussianEnvelopeConv2d(4, 6, 3, order=order)
    torch.manual_seed(1)
    plain, state = nn.Conv2d(4, 6, 3), layer.state_dict()
    assert set(state) == {"conv.weight", bias, "raw_sigma"}
    assert torch.equal(state["conv.weight"], plain.weight)
    assert torch.equal(state[bias], plain.bias)
    assert layer.bias is layer.get_parameter(bias)
    assert torch.equal(layer.raw_sigma, torch.zeros(channels))
    torch.testing.assert_close(layer.variance, torch.full((channels,), math.log(2)))
    assert GaussianEnvelopeConv2d(4, 6, 3, order=order, bias=False).bias is None
    assert GaussianEnvelopeConv2d(4, 6, 3, order=order, sigma_per="layer").raw_sigma.shape == (1,)


def test_a_given_sigma_is_kept_through_reset_and_can_be_fixed() -> None:
    layer = GaussianEnvelopeConv2d(4, 6, 3, initial_sigma=0.6, learn_sigma=False)
    layer.reset_parameters()
    torch.testing.assert_close(layer.sigma, torch.full((4,), 0.6))
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
    assert layer.raw_sigma.grad is None
    assert layer.conv.weight.grad is not None


# The convolution is a module of its own, and the last operation


class LowRank(nn.Module):
    """An adapter: a frozen convolution, and a trained one of low rank beside it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv.requires_grad_(False)
        self.down = nn.Conv2d(4, 2, conv.kernel_size, conv.stride, conv.padding, bias=False, dtype=conv.weight.dtype)
        self.up = nn.Conv2d(2, 6, 1, bias=False, dtype=conv.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Conv2d:
        conv = copy.deepcopy(self.base)
        conv.weight += torch.einsum("orxy,rikl->oikl", self.up.weight.detach(), self.down.weight.detach())
        return conv


@pytest.mark.parametrize("name", ["strided", "shortcut"])
def test_an_adapter_in_place_of_the_convolution_trains_and_merges(name: str) -> None:
    layer, x = build(name), images()
    layer.conv = adapter = LowRank(layer.conv)
    frozen = adapter.base.weight.clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = layer.to_conv()(x)
    layer(x).square().mean().backward()
    optimizer.step()
    trained = layer(x)
    assert not torch.allclose(trained, before)
    assert torch.equal(adapter.base.weight, frozen)
    torch.testing.assert_close(layer.to_conv()(x), trained)
    with pytest.raises(ValueError, match="conv: expected an nn.Conv2d to fold .*, not LowRank; merge the adapter"):
        layer.to_dense_conv()
    layer.conv = adapter.merged()
    torch.testing.assert_close(layer(x), trained)
    torch.testing.assert_close(layer.to_conv()(x), trained)


def test_a_hook_on_the_convolution_is_called_at_a_networks_entrance() -> None:
    layer, x = build(), images()
    layer.conv.register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(layer(x), 2 * scipy_layer(layer, x))


@pytest.mark.parametrize("name", ["strided", "shortcut"])
def test_a_norm_can_be_folded_into_the_convolution(name: str) -> None:
    layer, norm, x = build(name), nn.BatchNorm2d(6, dtype=torch.float64).eval(), images()
    for values in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(values)
    expected = norm(layer(x))
    layer.conv = torch.nn.utils.fuse_conv_bn_eval(layer.conv, norm)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_conv()(x), expected)


# A delta


def test_a_delta_is_skipped_without_a_gradient_and_has_the_same_bits() -> None:
    """With one, sigma's is 0. DistributedDataParallel would miss a parameter that has none."""
    layer, plain, x = build(initial_sigma=0, dtype=torch.float32), nn.Conv2d(4, 6, 3, 2, 1), torch.randn(2, 4, 8, 8)
    layer.reset_parameters()
    plain.load_state_dict(layer.conv.state_dict())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    assert counter.get_total_flops() == 2 * (2 * 6 * 4 * 9 * 2 * 4 * 4)
    y = layer(x)
    assert torch.equal(y, plain(x.contiguous(memory_format=torch.channels_last)))  # as smoothed images lie
    assert torch.equal(torch.autograd.grad(y.sum(), layer.raw_sigma)[0], torch.zeros(4))


def test_a_delta_that_widens_smooths_again() -> None:
    layer, x = build(), images()
    nn.init.constant_(layer.raw_sigma, -20.0)
    with torch.no_grad():
        narrow = layer(x)
        layer.raw_sigma.data[2] = 1.0  # past autograd's version counter
        assert not torch.equal(layer(x), narrow)
        torch.testing.assert_close(layer(x), scipy_layer(layer, x))


# What PyTorch does with modules


@inside_and_at_the_entrance
@pytest.mark.parametrize("name", ["strided", "after"])
def test_autocast_computes_in_bfloat16_with_gradients_near_those_of_float32(name: str, needs_gradient: bool) -> None:
    layer, x = build(name).float().train(), images().float().requires_grad_(needs_gradient)
    exact = layer(x)
    (expected,) = torch.autograd.grad(exact.square().mean(), [layer.raw_sigma])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (actual,) = torch.autograd.grad(y.float().square().mean(), [layer.raw_sigma])
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    layer, x = build(), images()
    expected = layer(x)
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).double(), expected, rtol=0.05, atol=0.05)


# Mistakes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sigma_that_is_not_finite_is_refused(value: float) -> None:
    layer = build()
    with torch.no_grad():
        layer.raw_sigma[1] = value
    for use in (lambda: layer(images()), layer.to_conv, lambda: layer.train()(images())):
        with pytest.raises(ValueError, match="raw_sigma: 1 of 4 values are NaN or infinite, expected finite numbers"):
            use()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"envelope_size": 4}, "envelope_size=4: expected an odd int from 3 to 255"),
        ({"inference_size": 11}, "inference_size=11: expected an odd int from 3 to 9"),
        ({"order": "conv"}, "order='conv': expected 'before' or 'after'"),
        ({"sigma_per": "pixel"}, "sigma_per='pixel': expected 'channel' or 'layer'"),
        ({"initial_sigma": 1e6}, "initial_sigma=1000000.0: expected at most 255"),
        ({"stride": 0}, "stride=0: expected a positive int"),
        ({"groups": 4}, "out_channels=6: expected a multiple of groups=4"),
        ({"stride": 2, "padding": "same", "padding_mode": "reflect"}, "padding='same' with .*padding_mode='reflect'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianEnvelopeConv2d(4, 6, 3, **arguments)


def test_other_dimensions_are_refused_and_dilation_is_not() -> None:
    spec = EnvelopeSpec()
    assert spec.refusal(nn.Conv1d(4, 4, 3, 2)) == "genv has no 1-D layer"
    assert spec.refusal(nn.Conv2d(4, 4, 3, dilation=2)) is None
