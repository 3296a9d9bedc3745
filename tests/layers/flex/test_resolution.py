"""FlexConvs at other resolutions than the one that they were made for."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_contconv.layers.flex import FlexConv1d, FlexConv2d, at_resolution

from .oracle import direct_kernel, make, set_mask_


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 12, 11)


@pytest.mark.parametrize(
    ("size", "source", "target"), [(7, 224, 256), (33, 32, 33), (33, 32, 35), (31, 224, 256), (31, 224, 112)]
)
def test_a_kernel_keeps_its_sum_at_any_resolution(size, source, target):
    layer = FlexConv2d(1, 1, size, initial_sigma=0.3, threshold=0.0, input_scale=0.1, dtype=torch.float64)
    before = layer.weight.sum().item()
    after = layer.at_resolution(source, target).weight.sum().item()
    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("mean", [0.0, 0.45])
@pytest.mark.parametrize(
    ("size", "source", "target", "expected"),
    [(7, 224, 256, 7), (15, 14, 15, 15), (15, 14, 23, 23), (10, 9, 14, 14), (15, 14, 6, 7), (2, 4, 1, 1)],
)
def test_pixels_are_a_step_apart_about_the_centre(size, source, target, expected, mean, x):
    layer = set_mask_(make(kernel_size=size), [mean, 0.0], [0.3, 0.6]).at_resolution(source, target)
    assert layer.kernel_size == (expected, expected)
    step = 2 / (size - 1) * source / target
    axis = (np.arange(expected) - (expected - 1) / 2) * step
    kernel = torch.from_numpy(direct_kernel(layer, axes=[axis, axis]) * (source / target) ** 2).float()
    torch.testing.assert_close(layer.weight.detach(), kernel, atol=1e-5, rtol=1e-4)
    before, after = (expected - 1) // 2, expected // 2
    y = F.conv2d(F.pad(x, (before, after, before, after)), kernel, layer.bias, groups=8)
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.to_conv()(x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "source", "target", "expected"), [(8, 8, 16, 15), (20, 20, 27, 27), (21, 10, 3, 7)])
def test_pixels_of_causal_kernels_are_a_step_apart_from_the_newest(size, source, target, expected):
    layer = set_mask_(FlexConv1d(2, 2, size), [0.8], [0.4]).at_resolution(source, target)
    assert layer.kernel_size == (expected,)
    axis = 1 - np.arange(expected)[::-1] * 2 / (size - 1) * source / target
    kernel = torch.from_numpy(direct_kernel(layer, axes=[axis]) * source / target).float()
    x = torch.randn(1, 2, 30)
    y = F.conv1d(F.pad(x, (expected - 1, 0)), kernel, layer.bias)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.to_conv()(x), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("resolutions", [(32, 20, 32), (32, 33, 7, 32), (224, 256, 300, 224)])
@pytest.mark.parametrize("options", [{"kernel_size": 31}, {"kernel_size": 8}, {"kernel_size": 9, "padding": (0, 3)}])
def test_turns_there_and_back_leave_a_layer_as_it_was(resolutions, options):
    layer = make(**options)
    before, padding = layer.weight.detach(), layer.padding
    for source, target in itertools.pairwise(map(np.int64, resolutions)):
        assert layer.at_resolution(source, target) is layer
    assert layer.padding == padding
    assert layer.unsaved_setting() is None
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "padding"), [(7, 0), (7, 1), (8, 0), (5, (0, 4))])
@pytest.mark.parametrize(("source", "target"), [(224, 256), (7, 3), (10, 11)])
def test_a_layer_at_any_resolution_has_padding_and_merges(size, padding, source, target):
    layer = FlexConv2d(1, 1, size, padding=padding, mask=False).at_resolution(source, target)
    assert min(layer.padding) >= 0
    x = torch.randn(1, 1, 20, 20)
    torch.testing.assert_close(layer.to_conv()(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", ["same", 8, 5, 0])
def test_output_keeps_its_place_at_another_resolution(padding):
    layer = FlexConv2d(1, 1, 17, padding=padding)
    shrink = 24 - layer(torch.randn(1, 1, 24, 24)).shape[-1]
    layer.at_resolution(16, 32)
    assert 48 - layer(torch.randn(1, 1, 48, 48)).shape[-1] == 2 * shrink


def test_a_layer_at_another_resolution_is_copied_compiled_exported_and_traced(x):
    layer = make().eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():  # a kernel is kept, which must not outlive a turn
        for source, target in ((7, 8), (8, 4)):
            layer(x)
            expected = layer.at_resolution(source, target)(x)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
            exported = torch.export.export(layer, (x,)).module(check_guards=False)
            for graph in (compiled, exported, torch.fx.symbolic_trace(nn.Sequential(layer))):
                torch.testing.assert_close(graph(x), expected, atol=1e-5, rtol=1e-4)


def test_resolution_of_a_whole_model_and_what_is_left_alone():
    model = nn.Sequential(make(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    with pytest.warns(UserWarning, match="1 plain convolutions keep their kernels at the new resolution: 1"):
        assert at_resolution(model, 14, 28) is model
    assert model[0].kernel_size == (29, 29)
    assert model[0].unsaved_setting() == "at 2 times the resolution that it was made for"
    with pytest.raises(ValueError, match="holds no FlexConv"):
        at_resolution(nn.Conv2d(1, 1, 3), 14, 28)
    with pytest.raises(ValueError, match="target=0: expected a positive int"):
        at_resolution(model, 28, 0)
    assert model[0].kernel_size == (29, 29)
