"""Convolutions with a Gaussian envelope, against SciPy, autograd and plain convolutions."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import ndimage, special
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from timm_contconv.layers import GaussianEnvelopeConv2d
from timm_contconv.layers.gaussian import envelope_filter, envelope_filter_derivative, smooth, smooth_and_convolve

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
settings = pytest.mark.parametrize("name", SETTINGS)


def build(name: str = "strided", **changes) -> GaussianEnvelopeConv2d:
    """A float64 layer from 4 to 6 channels with a different sigma in every channel, in eval mode."""
    layer = GaussianEnvelopeConv2d(4, 6, **{"envelope_size": 5, "dtype": torch.float64, **SETTINGS[name], **changes})
    nn.init.normal_(layer.geometry["sigma"])
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


# The envelope


@pytest.mark.parametrize("mode", SCIPY_MODES)
@pytest.mark.parametrize("size", [3, 9])
def test_smoothing_is_scipys_correlation_with_the_softmax_filter(size: int, mode: str) -> None:
    x, sigma = images(), torch.tensor([0.2, 0.6, 0.83, 2.0], dtype=torch.float64)
    torch.testing.assert_close(smooth(x, sigma.square(), size, padding_mode=mode), scipy_smooth(x, sigma, size, mode))


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (4, 1)])
def test_strided_smoothing_computes_every_so_many_th_position(stride: tuple[int, int]) -> None:
    x, variance = images(), torch.rand(4, dtype=torch.float64) + 0.2
    torch.testing.assert_close(smooth(x, variance, 9, stride), smooth(x, variance, 9)[..., :: stride[0], :: stride[1]])


def test_derivative_of_the_filter_is_that_of_autograd() -> None:
    variance = torch.tensor([0.05, 0.3, 0.7, 4.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: envelope_filter(v, 9), variance)
    torch.testing.assert_close(envelope_filter_derivative(variance, 9), torch.einsum("ctc->ct", jacobian))


@pytest.mark.parametrize("name", ["strided", "shortcut", "after"])
def test_gradient_of_sigma_is_equation_8(name: str) -> None:
    layer, x = build(name), images()
    smoothed = x if layer.order == "before" else F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    y = layer(x)
    grad_y = images(*y.shape)
    sigma = layer.sigma.detach().requires_grad_()
    enveloped = smooth(smoothed.detach(), sigma.square(), 5).requires_grad_()
    end = F.conv2d(enveloped, layer.weight, None, layer.stride, layer.padding) if name != "after" else enveloped
    (grad_enveloped,) = torch.autograd.grad(end, enveloped, grad_y)
    derivative = 2 * sigma.detach().unsqueeze(1) * envelope_filter_derivative(sigma.detach().square(), 5)
    expected = []
    for c, width in enumerate(sigma.tolist()):
        taps, d_taps = scipy_filter(width, 5), derivative[c].numpy()
        plane = smoothed[:, c].detach().numpy()
        along = [ndimage.correlate1d(plane, t, 1, mode="constant") for t in (d_taps, taps)]
        change = ndimage.correlate1d(along[0], taps, 2, mode="constant")
        change += ndimage.correlate1d(along[1], d_taps, 2, mode="constant")
        expected.append((change * grad_enveloped[:, c].numpy()).sum())
    d_sigma_d_raw = torch.sigmoid(layer.geometry["sigma"].detach()) / (2 * sigma.detach())
    (actual,) = torch.autograd.grad(y, layer.geometry["sigma"], grad_y)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64) * d_sigma_d_raw)


@pytest.mark.parametrize("name", ["shortcut", "grouped", "same", "circular", "after", "one sigma"])
def test_first_derivatives_are_right(name: str) -> None:
    layer, x = build(name).train(), images(1, 4, 5, 6, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)
    run = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize(
    "name", ["plain", "strided", "shortcut", "uneven", "grouped", "dilated", "one sigma", "shrunk"]
)
def test_an_image_that_needs_no_gradient_gives_the_same_ones(name: str) -> None:
    layer, x = build(name), images()
    parameters = list(layer.parameters())
    grad = images(*layer(x).shape)
    torch.testing.assert_close(layer(x), layer(x.clone().requires_grad_()))
    expected = torch.autograd.grad(layer(x.clone().requires_grad_()), parameters, grad)
    for actual, wanted in zip(torch.autograd.grad(layer(x), parameters, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_derivatives_at_a_networks_entrance_are_right() -> None:
    x, variance = images(1, 4, 4, 5), (torch.rand(4, dtype=torch.float64) + 0.3).requires_grad_()
    weight = images(6, 2, 3, 3, requires_grad=True)
    run = lambda x, v, w: smooth_and_convolve(x, v, 5, (1, 1), w, (2, 2), (1, 1), (1, 1), 2)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, variance, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, variance, weight), fast_mode=True)
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), variance, weight), fast_mode=True)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_second_derivatives_are_right(stride: tuple[int, int]) -> None:
    x, variance = images(1, 2, 4, 5, requires_grad=True), torch.tensor([0.3, 1.1], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, v: smooth(x, v, 5, stride), (x, variance), fast_mode=True)


def test_gradients_per_sample_come_from_vmap() -> None:
    layer, x = build("strided"), images(3, 4, 6, 6)
    parameters = dict(layer.named_parameters())
    loss = lambda p, x: torch.func.functional_call(layer, p, (x[None],)).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))({**parameters}, x)
    torch.testing.assert_close(
        per_sample["geometry.sigma"][1], torch.func.grad(loss)(parameters, x[1])["geometry.sigma"]
    )


# The layer


@pytest.mark.parametrize("name", ["plain", "strided", "shortcut", "grouped", "dilated", "one sigma"])
def test_envelope_then_convolution(name: str) -> None:
    layer, x = build(name), images()
    smoothed = scipy_smooth(x, layer.sigma, 5)
    expected = F.conv2d(smoothed, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.testing.assert_close(layer(x), expected)


def test_convolution_then_envelope_then_bias() -> None:
    layer, x = build("after"), images()
    smoothed = scipy_smooth(F.conv2d(x, layer.weight, None, 2, 1), layer.sigma, 5)
    torch.testing.assert_close(layer(x), smoothed + layer.bias.view(-1, 1, 1))


def test_one_image_without_a_batch_dimension() -> None:
    layer, x = build("strided"), images(4, 12, 13)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("sigma_per", "count"), [("channel", {"before": 4, "after": 6}), ("layer", 1)])
def test_sigma_starts_with_a_zero_for_each_smoothed_channel(order: str, sigma_per: str, count: int | dict) -> None:
    layer = GaussianEnvelopeConv2d(4, 6, 3, order=order, sigma_per=sigma_per)
    expected = torch.zeros(count if isinstance(count, int) else count[order])
    assert torch.equal(layer.geometry["sigma"], expected)
    torch.testing.assert_close(layer.variance, torch.full_like(expected, math.log(2)))


def test_a_given_sigma_is_kept_through_reset_and_can_be_fixed() -> None:
    layer = GaussianEnvelopeConv2d(4, 6, 3, initial_sigma=0.6, learn_sigma=False)
    layer.reset_parameters()
    torch.testing.assert_close(layer.sigma, torch.full((4,), 0.6))
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
    assert layer.geometry["sigma"].grad is None
    assert layer.weight.grad is not None


def test_state_dict_is_the_plain_convolutions_and_sigma() -> None:
    layer, plain = GaussianEnvelopeConv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    assert list(layer.state_dict()) == [*plain.state_dict(), "geometry.sigma"]
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("name", ["strided", "after"])
def test_a_batch_norm_can_be_fused(name: str) -> None:
    layer, norm, x = build(name), nn.BatchNorm2d(6, dtype=torch.float64).eval(), images()
    for values in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(values)
    torch.testing.assert_close(torch.nn.utils.fuse_conv_bn_eval(layer, norm)(x), norm(layer(x)))


def test_smaller_filters_outside_training_only() -> None:
    layer, x = build("strided"), images()
    full = layer(x)
    assert layer.shrink(3) is layer
    expected = F.conv2d(scipy_smooth(x, layer.sigma, 3), layer.weight, layer.bias, 2, 1)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.train()(x), full)
    assert torch.equal(layer.eval().shrink(5)(x), full)


# A delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrow_envelope_is_no_pass_and_the_same_bits(dtype: torch.dtype) -> None:
    layer = GaussianEnvelopeConv2d(4, 6, 3, 2, 1, initial_sigma=0, dtype=dtype)
    plain, x = nn.Conv2d(4, 6, 3, 2, 1, dtype=dtype), torch.randn(2, 4, 8, 8, dtype=dtype)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert torch.equal(y, plain(x))
    assert counter.get_total_flops() == 2 * 6 * 4 * 9 * 2 * 4 * 4


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 208**-0.5), (torch.float64, 1500**-0.5)])
def test_what_is_skipped_is_a_delta_without_a_gradient(dtype: torch.dtype, width: float) -> None:
    variance = torch.tensor([width**2], dtype=dtype)
    delta = torch.tensor([[0.0, 0, 1, 0, 0]], dtype=dtype)
    assert torch.equal(envelope_filter(variance, 5), delta)
    assert torch.equal(envelope_filter_derivative(variance, 5), torch.zeros_like(delta))


def test_a_delta_that_widens_smooths_again() -> None:
    layer, x = build("strided", initial_sigma=0), images()
    nn.init.constant_(layer.geometry["sigma"], -20.0)
    narrow = layer(x)
    layer.geometry["sigma"].data[2] = 1.0  # past autograd's version counter
    assert not torch.equal(layer(x), narrow)
    torch.testing.assert_close(layer(x), layer.to_conv()(x))


# Plain forms


@settings
def test_plain_convolutions_have_the_same_output(name: str) -> None:
    layer, x = build(name), images()
    plain = layer.to_conv()
    assert {type(module) for module in plain} <= {nn.Conv2d, Conv2dSame}
    torch.testing.assert_close(plain(x), layer(x))


@settings
def test_dense_convolution_has_the_same_output_in_the_interior(name: str) -> None:
    layer, x = build(name), images(2, 4, 24, 25)
    dense = layer.to_dense_conv()
    assert isinstance(dense, nn.Conv2d)
    assert dense(x).shape == layer(x).shape
    torch.testing.assert_close(dense(x)[..., 4:-4, 4:-4], layer(x)[..., 4:-4, 4:-4])


@pytest.mark.parametrize("name", ["shortcut", "circular", "reflect"])
def test_dense_convolution_is_exact_at_the_borders_where_it_says_so(name: str) -> None:
    layer, x = build(name), images()
    torch.testing.assert_close(layer.to_dense_conv()(x), layer(x))


def test_a_delta_is_one_plain_convolution() -> None:
    layer = GaussianEnvelopeConv2d(4, 6, 3, initial_sigma=0)
    assert type(layer.to_conv()) is nn.Conv2d
    assert layer.to_dense_conv().kernel_size == (3, 3)


def test_dense_refuses_what_no_padding_can_place() -> None:
    with pytest.raises(ValueError, match=r"padding='same' with kernel_size=\(2, 2\) and stride=\(4, 4\)"):
        GaussianEnvelopeConv2d(4, 6, 2, 4, "same").to_dense_conv()


# What PyTorch does with modules


@settings
def test_copies_pickles_traces_and_exports_agree(name: str) -> None:
    layer, x = build(name), images()
    expected = layer(x)
    copies = {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "fx": torch.fx.symbolic_trace(layer),
        "export": torch.export.export(layer, (x,)).module(),
    }
    for how, other in copies.items():
        torch.testing.assert_close(other(x), expected, msg=lambda text, how=how: f"{how}: {text}")


@pytest.mark.parametrize("name", ["strided", "shortcut", "after"])
def test_compiled_in_one_graph_with_the_same_gradients(name: str) -> None:
    layer, x = build(name).train(), images(requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_built_on_meta_and_materialised() -> None:
    layer = GaussianEnvelopeConv2d(4, 6, 3, 2, 1, device="meta")
    assert layer(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 6, 4, 4)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.geometry["sigma"], torch.zeros(4))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_smoothing_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    x = images().contiguous(memory_format=memory_format)
    assert smooth(x, torch.ones(4, dtype=torch.float64), 5).is_contiguous(memory_format=memory_format)


def test_autocast_computes_in_bfloat16_with_gradients_near_those_of_float32() -> None:
    layer, x = build("strided").float().train(), images().float()
    exact = layer(x)
    exact.square().mean().backward()
    expected = layer.geometry["sigma"].grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(layer.geometry["sigma"].grad, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    layer, x = build("strided"), images()
    expected = layer(x)
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).double(), expected, rtol=0.05, atol=0.05)


def test_a_delta_gives_sigma_a_gradient_of_zero() -> None:
    """Without one, DistributedDataParallel and torch.autograd.grad would miss a parameter."""
    layer = GaussianEnvelopeConv2d(4, 4, 3, 2, 1, initial_sigma=0)
    for gradient in torch.autograd.grad(layer(torch.randn(2, 4, 8, 8)).sum(), tuple(layer.geometry.values())):
        assert not gradient.any()
