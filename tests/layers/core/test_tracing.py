"""Layers under torch.fx: one node each, with their parameters."""

import copy

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import nn
from torchvision.models import feature_extraction

from tests.helpers import LAYERS, every_layer, image_for, spread_
from tests.models_for_tests import awake
from timm_contconv.layers import ConvReplacement


def trained_step(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the parameters that one step changes."""
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    outputs = module(x)
    outputs = outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))
    outputs.square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    return [name for name, value in module.named_parameters() if not torch.equal(value, before[name])]


@every_layer
def test_a_traced_layer_is_one_node_with_its_parameters(make):
    model = nn.Sequential(spread_(make()), nn.ReLU())
    x, traced = image_for(model[0]), torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes][1:-1] == [("call_module", "0"), ("call_module", "1")]
    for training in (True, False):
        assert torch.equal(traced.train(training)(x), model.train(training)(x))
    assert trained_step(traced.train(), x) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))


@every_layer
def test_torchvisions_feature_extractor_keeps_layers(make):
    model = nn.Sequential(nn.Identity(), spread_(make()), nn.ReLU())
    features = feature_extraction.create_feature_extractor(model, ["1"])
    x = image_for(model[1])
    assert torch.equal(features(x)["1"], model[1](x))
    assert trained_step(features, x) == [name for name, _ in model.named_parameters()]


def test_timms_feature_extractor_keeps_the_layers_of_a_model():
    model = timm.create_model("test_convnext_dcls_gauss", num_classes=3)
    features, x = create_feature_extractor(model, ["stages.1"]), torch.randn(1, 3, 64, 64)
    layers = [name for name, module in model.named_modules() if isinstance(module, ConvReplacement)]
    nodes = [node.target for node in features.graph.nodes if node.op == "call_module"]
    assert [name for name in nodes if name in layers] == [name for name in layers if name < "stages.2"]
    expected = model.stages[1](model.stages[0](model.stem(x)))
    torch.testing.assert_close(features(x)["stages.1"], expected)


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda model: create_feature_extractor(model, ["head"])])
def test_a_graph_holds_the_geometry_that_its_layers_share(trace):
    model = awake(timm.create_model("test_convnext_dcls_gauss", num_classes=3))
    traced = copy.deepcopy(trace(model))
    assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert set(trained_step(traced, torch.randn(1, 3, 64, 64))) >= {
        name for name, _ in model.named_parameters() if "geometry" in name
    }


def test_a_lone_layer_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"root: a DclsConv2d .* can't be traced alone; .* nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(LAYERS["dcls"]())
