"""What a convolution with a constructed kernel promises to third-party code."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F

import timm_contconv as tcc
from tests.helpers import LAYERS, every_kernel_layer, every_layer, image_for, spread_
from timm_contconv.layers import DclsConv1d, DclsConv2d, DclsConv3d, FlexConv1d, SmpConv1d, SmpConv2d
from timm_contconv.layers.dcls import DclsSpec

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("layer_type", [DclsConv1d, DclsConv2d, DclsConv3d])
def test_attributes_are_those_of_a_plain_convolution(layer_type):
    options = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect"}
    layer = layer_type(4, 6, 3, **options, kernel_count=2)
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[layer.ndim](4, 6, 3, **options)
    names = "in_channels out_channels kernel_size stride padding dilation transposed output_padding groups padding_mode"
    for name in names.split():
        assert getattr(layer, name) == getattr(plain, name), name
    assert layer.weight.shape == plain.weight.shape
    assert layer.bias.shape == plain.bias.shape


# ---- the convolution


@every_kernel_layer
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_convolves_with_its_weight(make, training):
    """Against PyTorch's convolution of the image that is padded by hand."""
    layer = spread_(make()).train(training)
    x = image_for(layer)
    if layer.padding == "causal":
        before, after = [layer.kernel_size[0] - 1], [0]
    elif layer.padding == "same":
        dimensions = zip(x.shape[2:], layer.stride, layer.kernel_size, strict=True)
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in dimensions]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = layer.padding
    sides = [amount for side in zip(reversed(before), reversed(after), strict=True) for amount in side]
    padded = F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    expected = CONVOLVE[layer.ndim](padded, layer.weight, layer.bias, layer.stride, groups=layer.groups)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_every_padding_mode(mode):
    x = torch.randn(2, 4, 9, 10)
    layer = DclsConv2d(4, 6, (5, 4), padding=(2, 1), padding_mode=mode, kernel_count=3)
    padded = F.pad(x, (1, 1, 2, 2), mode="constant" if mode == "zeros" else mode)
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


every_causal_layer = pytest.mark.parametrize("layer_type", [SmpConv1d, FlexConv1d])


@every_causal_layer
@pytest.mark.parametrize("length", [1, 3, 20, 40])
def test_a_causal_output_has_the_length_of_the_input_and_does_not_see_the_future(layer_type, length):
    layer = spread_(layer_type(3, 4, 20))
    x = torch.randn(2, 3, length)
    expected = F.conv1d(F.pad(x, (19, 0)), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.to_conv()(x), expected, atol=1e-5, rtol=1e-5)


@every_causal_layer
@pytest.mark.parametrize("groups", [1, 3])
def test_a_causal_kernel_of_16000_samples_convolves_as_scipy_does(layer_type, groups):
    layer = spread_(layer_type(3, 3, 16000, groups=groups))
    x = torch.randn(1, 3, 16000)
    kernel = layer.weight.detach().double().numpy()[..., ::-1]
    y = layer(x)
    for out in range(3):
        sources = [out] if groups == 3 else range(3)
        expected = sum(fftconvolve(x[0, i].double().numpy(), kernel[out, i % kernel.shape[1]])[:16000] for i in sources)
        np.testing.assert_allclose(y[0, out].detach().numpy(), expected, atol=1e-4 * np.abs(expected).max())


@every_causal_layer
def test_causal_padding_has_zeros_only(layer_type):
    with pytest.raises(ValueError, match="padding_mode='reflect': expected 'zeros'; causal"):
        layer_type(2, 2, 8, padding_mode="reflect")


@every_kernel_layer
def test_one_image_without_a_batch_dimension(make):
    layer = make()
    x = image_for(layer)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@every_kernel_layer
def test_channels_last_input_gives_the_same_output(make):
    layer = make()
    x = image_for(layer)
    memory_format = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim]
    y = layer(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-4)


@every_layer
def test_gradcheck_of_a_float64_layer(make):
    layer = spread_(make(dtype=torch.float64)).eval()
    x = image_for(layer, batch=1)[(..., *[slice(4)] * len(layer.kernel_size))]
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *layer.parameters()), fast_mode=True)


# ---- the kernel


@every_kernel_layer
def test_a_kernel_is_constructed_in_float32_under_autocast(make):
    layer = make()
    x = image_for(layer)
    expected, y = layer.kernel(), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.kernel(), expected)
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), y, atol=0.05 * y.abs().max().item(), rtol=0)


@every_kernel_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_of_half_precision_is_constructed_in_float32(make, dtype):
    layer = make(dtype=dtype)
    assert torch.equal(layer.kernel(), copy.deepcopy(layer).float().kernel().to(dtype))


def test_weight_cannot_be_set():
    with pytest.raises(AttributeError, match="weight: it is constructed and can't be set; to_conv"):
        nn.utils.fuse_conv_bn_eval(LAYERS["dcls"]().eval(), nn.BatchNorm2d(8).eval())


def test_weight_can_be_fused_with_a_batch_norm():
    layer, norm = LAYERS["dcls"]().eval(), nn.BatchNorm2d(8).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    weight, bias = nn.utils.fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    x = image_for(layer)
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=3, groups=8), norm(layer(x)), atol=1e-5, rtol=1e-4)


# ---- in place of a convolution, and back


@every_layer
def test_merging_gives_a_plain_convolution_with_the_same_output(make):
    model = nn.Sequential(spread_(make()).eval())
    merged, x = tcc.merge(model), image_for(model[0])
    torch.testing.assert_close(merged(x), model(x), atol=1e-4, rtol=1e-4)
    is_timms = model[0].padding == "same" and max(model[0].stride) > 1 and model[0].method != "cc"
    plain = Conv2dSame if is_timms else {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[x.ndim - 2]
    assert {type(module) for module in merged.modules()} - {nn.Sequential, nn.ConstantPad1d} == {plain}


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_from_conv_keeps_output_size_and_place(size):
    conv = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8)
    layer = DclsConv2d.from_conv(conv, DclsSpec(interpolation="bilinear", kernel_size=size, kernel_count=1))
    with torch.no_grad():  # one element in the middle: the layer is the identity, as a centred delta is for conv
        layer.kernel.weight.fill_(1)
        layer.kernel.position.zero_()
        layer.bias.zero_()
        nn.init.dirac_(conv.weight, groups=8)
        conv.bias.zero_()
    x = torch.randn(2, 8, 12, 11)
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"kernel_size": 6}, {}, r"kernel_size=\(6, 6\) can't be centred .* differ by an even number"),
        ({}, {"init": "nearest"}, "init='nearest': expected 'fit'"),
        ({"kernel_size": (7, 7, 7)}, {}, r"kernel_size=\(7, 7, 7\): expected an int, or 2 of them, one per dimension"),
    ],
)
def test_from_conv_refuses_what_does_not_fit(change, options, message):
    spec = DclsSpec(**{"interpolation": "bilinear", "kernel_size": 7, "kernel_count": 1, **change})
    with pytest.raises(ValueError, match=message):
        DclsConv2d.from_conv(nn.Conv2d(8, 8, 5, padding=2, groups=8), spec, **options)


def test_a_kernel_without_finite_values_is_not_fitted():
    conv, spec = nn.Conv2d(2, 2, 3), DclsSpec(kernel_size=5, kernel_count=3)
    conv.weight.data[0, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="init='fit': 1 of 36 values of Conv2d.* are NaN or infinite"):
        DclsConv2d.from_conv(conv, spec)
    with pytest.raises(ValueError, match=r"init='fit': .* meta device and hold no kernels; use init='random'"):
        DclsConv2d.from_conv(conv.to("meta"), spec)
    assert DclsConv2d.from_conv(conv, spec, init="random").kernel.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fitted_to_its_rounding(dtype):
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4, dtype=dtype)
    layer = SmpConv2d.from_conv(conv, SmpConv2d.spec_class(kernel_size=11))
    assert layer.weight.dtype == dtype
    assert layer.fit_error(conv) < 2 * torch.finfo(dtype).eps


# ---- copies, meta device, other modes


@every_layer
def test_copies_pickles_and_state_dicts_keep_the_output(make):
    layer = spread_(make()).eval()
    x, loaded = image_for(layer), make().eval()
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), layer(x))


@every_layer
def test_a_meta_layer_is_materialised_by_reset_parameters(make):
    layer, x = make(device="meta"), image_for(make())
    shape = layer(x.to("meta")).shape
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    y = layer(x)
    assert y.shape == shape
    assert y.isfinite().all()
    assert y.std() > 0


def test_data_parallel_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match="DclsConv2d: nn.DataParallel does not .* DistributedDataParallel"):
        LAYERS["dcls"]()._replicate_for_data_parallel()  # PyTorch's hook: replicate() itself wants a GPU
