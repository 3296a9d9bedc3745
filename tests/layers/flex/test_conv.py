"""What FlexConvs promise as layers of this package; causal convolutions of sequences."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from timm_contconv.layers.flex import FlexConv1d, FlexConv2d
from timm_contconv.ops import algorithm

from .oracle import MAGNET, make, set_mask_

KINDS = [{}, {"mask": False}, {"groups": 1}, {"threshold": 0.0, "compile": False}]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 12, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_keep_the_output(kind, x):
    layer = make(**kind).eval()
    expected = layer(x)
    loaded = make(**kind).eval()
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_keys_of_the_state_dict():
    names = [f"kernel.{name}" for name in (*MAGNET, "mask_mean", "mask_sigma")]
    assert set(make().state_dict()) == {"bias", *names}


def test_kept_kernel_follows_every_parameter_and_ema(x):
    layer = make(initial_sigma=0.4).eval()
    ema = ModelEmaV3(layer, decay=0.5)
    with torch.no_grad():
        for parameter in layer.kernel.parameters():
            before = layer(x)
            ema.module(x)
            parameter.add_(0.3)
            ema.update(layer)
            assert (layer(x) - before).abs().max() > 1e-4
            for one in (layer, ema.module):
                torch.testing.assert_close(one.weight, copy.deepcopy(one).train().weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer_type", [FlexConv1d, FlexConv2d])
def test_meta_layer_is_materialised_by_reset_parameters(layer_type):
    layer = layer_type(4, 4, 9, groups=4, device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.isfinite().all()
    assert layer.weight.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_exported_and_traced_layers_equal_eager(kind, training, x):
    layer = make(**kind).train(training)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,)).module(check_guards=False)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    for graph in (compiled, exported, traced):
        torch.testing.assert_close(graph(x), expected, atol=1e-5, rtol=1e-4)
    if layer.kernel.geometry:
        set_mask_(layer, [0.0, 0.3], [0.6, 0.2])
        torch.testing.assert_close(traced(x), layer(x), atol=1e-5, rtol=1e-4)


def test_construction_compiled_by_inductor_equals_eager_for_all_crops():
    layer, compiled = (make(hidden_layers=1, compile=mode) for mode in (False, True))
    for sigma in (0.3, 0.6):
        compiled.load_state_dict(set_mask_(layer, [0.1, 0.0], [sigma, sigma / 2]).state_dict())
        assert compiled.kernel.margins is not None
        torch.testing.assert_close(compiled.weight, layer.weight, atol=1e-5, rtol=1e-4)


def test_kernels_are_constructed_in_float32_under_autocast_and_in_half_precision(x):
    layer = make()
    expected, expected_output = layer.weight, layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.weight, expected, rtol=0, atol=0)
        y = layer(x)
    assert (y.float() - expected_output).abs().max() < 0.03 * y.abs().max()
    for dtype in (torch.bfloat16, torch.float16):
        half = make().to(dtype)
        torch.testing.assert_close(half.weight, copy.deepcopy(half).float().weight.to(dtype), rtol=0, atol=0)


# ---- one dimension


def test_causal_output_has_the_length_of_the_input_and_does_not_see_the_future():
    layer = set_mask_(FlexConv1d(3, 4, 20), [0.7], [0.2]).eval()
    x = torch.randn(2, 3, 20)
    other = x.clone()
    other[..., 12:] = torch.randn(2, 3, 8)
    y, y_other = layer(x), layer(other)
    assert y.shape == (2, 4, 20)
    torch.testing.assert_close(y[..., :12], y_other[..., :12])
    torch.testing.assert_close(layer.to_conv()(x), y, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="padding_mode='reflect': expected 'zeros'; causal"):
        FlexConv1d(1, 1, 9, padding_mode="reflect")


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_causal_layers_take_sequences_of_any_length(length):
    layer = set_mask_(FlexConv1d(2, 2, 21), [0.0], [0.1]).eval()
    x = torch.randn(1, 2, length)
    expected = F.conv1d(F.pad(x, (20, 0)), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_causal_kernel_of_16000_samples_convolves_as_scipy_does(groups):
    layer = FlexConv1d(3, 3, 16000, groups=groups, initial_sigma=1.0)
    x = torch.randn(1, 3, 16000)
    kernel = layer.weight.detach().double().numpy()[..., ::-1]
    with algorithm("fft"):
        y = layer(x)
    for out in range(3):
        sources = [out] if groups == 3 else range(3)
        expected = sum(fftconvolve(x[0, i].double().numpy(), kernel[out, i % kernel.shape[1]])[:16000] for i in sources)
        np.testing.assert_allclose(y[0, out].detach().numpy(), expected, atol=1e-4 * np.abs(expected).max())
