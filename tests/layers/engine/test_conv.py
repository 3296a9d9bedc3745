"""DepthwiseConv2d and the recipe `engine`: exact, the same state dict, and back again."""

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

import timm_contconv as tcc
from tests.helpers import relative
from tests.models_for_tests import awake, create, layers_of, output
from timm_contconv import ops
from timm_contconv.layers import DepthwiseConv2d

#: convolutions and what a layer in their place is made of
CONVS = {
    "7": lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6),
    "stride": lambda: nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False),
    "same": lambda: nn.Conv2d(6, 6, (4, 3), padding="same", groups=6),
    "valid": lambda: nn.Conv2d(6, 6, 3, padding="valid", groups=6),
    "timm same": lambda: Conv2dSame(6, 6, 3, stride=2, groups=6),
    "reflect": lambda: nn.Conv2d(6, 6, 5, 2, padding=2, padding_mode="reflect", groups=6),
    "circular": lambda: nn.Conv2d(6, 6, 5, padding="same", padding_mode="circular", groups=6),
    "row": lambda: nn.Conv2d(6, 6, (1, 11), padding=(0, 5), groups=6),
}


class Net(nn.Sequential):
    """A convolution that a patch can reach."""


@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS.keys())
def test_a_layer_in_place_of_a_convolution_is_exact_and_gives_it_back(make):
    model, x = Net(make()).double(), torch.randn(2, 6, 15, 12, dtype=torch.float64, requires_grad=True)
    conv, state, text = model[0], copy.deepcopy(model.state_dict()), str(model)
    expected = conv(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, conv.weight])
    tcc.patch(model, "engine")
    layer = model[0]
    assert type(layer) is DepthwiseConv2d
    assert isinstance(layer, nn.Conv2d)
    result = layer(x)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result.square().sum(), [x, layer.weight]), gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert list(model.state_dict()) == list(state)
    for plain in (tcc.merge(model), tcc.unpatch(model)):
        assert type(plain[0]) is type(conv)
        torch.testing.assert_close(plain[0](x), expected)
        assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert str(model) == text


def test_every_algorithm_runs_in_the_layer():
    layer, x = DepthwiseConv2d(8, 13), torch.randn(2, 8, 20, 20)
    expected = nn.functional.conv2d(x, layer.weight, layer.bias, 1, 6, 1, 8)
    for name in ("pytorch", "channels_last", "direct", "fft"):
        with ops.algorithm(name):
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_defaults_are_those_of_a_convolution_that_keeps_the_size():
    layer = DepthwiseConv2d(4, 5, bias=False)
    assert layer.padding == (2, 2)
    assert layer.bias is None
    assert layer(torch.randn(4, 9, 8)).shape == (4, 9, 8)
    assert DepthwiseConv2d(4, (1, 7)).padding == (0, 3)
    with pytest.raises(ValueError, match="kernel_size=0"):
        DepthwiseConv2d(4, 0)
    with pytest.raises(ValueError, match="padding='full'"):
        DepthwiseConv2d(4, 3, padding="full")


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 8, 3, groups=4), "expected a depthwise convolution with as many channels out as in"),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), "only 1 can be replaced"),
        (nn.Conv1d(4, 4, 3, groups=4), "engine has no 1-D layer"),
    ],
)
def test_what_it_can_not_replace_is_refused(conv, message):
    with pytest.raises(ValueError, match=message):
        tcc.patch(Net(conv), "engine")


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_mambaout", "test_convnext2"])
def test_models_keep_their_output_state_dict_and_report(name):
    model, x = create(name), torch.randn(2, 3, 96, 96)
    expected, state = output(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    tcc.patch(model, "engine")
    assert layers_of(model)
    assert relative(output(model, x), expected) < 1e-5
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.load_state_dict(state)
    report = tcc.report(model)
    assert report.parameters_before == report.parameters_after
    assert {row.fit_error for row in report.rows} == {0.0}
    model.train()(x).square().mean().backward()
    assert all(layer.weight.grad.any() for layer in layers_of(model))


def test_a_merged_model_runs_on_the_engine():
    model, x = create("test_convnext_smp"), torch.randn(2, 3, 96, 96)
    expected = output(model, x)
    merged = tcc.patch(tcc.merge(model), "engine")
    assert relative(output(merged, x), expected) < 1e-5
    assert {type(layer) for layer in layers_of(merged)} == {DepthwiseConv2d}


def test_a_patched_model_is_saved_and_loaded(tmp_path):
    model, x = create("test_convnext"), torch.randn(1, 3, 96, 96)
    tcc.patch(model, "engine")
    folder = tcc.save_pretrained(model, tmp_path / "model")
    loaded = tcc.from_pretrained(folder).eval()
    assert layers_of(loaded)
    assert torch.equal(output(loaded, x), output(model, x))


def test_the_report_tells_what_was_gained():
    model = Net(DepthwiseConv2d(34, 23))  # sizes that no other test measures in this process
    layer = model[0]
    assert "not measured yet" in layer.summary()
    with ops.measuring(True):
        layer(torch.randn(4, 34, 27, 29, requires_grad=True)).sum().backward()
        assert layer.gains().keys() == {"output", "input", "weight"}
        assert min(layer.gains().values()) >= 1
        assert "weight" in layer.summary()


def test_graphs_compiled_and_exported_hold_the_layer():
    model, x = Net(DepthwiseConv2d(4, 9), nn.ReLU()).eval(), torch.randn(2, 4, 12, 12)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_features_of_a_patched_model():
    model = timm.create_model("test_convnext", features_only=True, out_indices=(0, 2))
    awake(model)
    x = torch.randn(1, 3, 64, 64)
    expected = output(model, x)
    assert relative(output(tcc.patch(model, "engine"), x), expected) < 1e-5
