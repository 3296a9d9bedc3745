"""The papers' own networks do what timm asks of a model."""

import copy

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters
from torch import nn

from ..models_for_tests import layers_of, on_meta

#: quick to run, without dropout: arguments, and the size of images
SMALL = {
    "smpconv_tiny": (
        {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "kernel_sizes": (13, 11, 9, 7), "drop_path_rate": 0.0}, 64,
    ),
    "flexnet3": ({"img_size": 16, "dim": 4, "flex_args": {"hidden_channels": 6}, "dropout": 0.0}, 16),
    "smpnet7": (
        {"img_size": 16, "dim": 4, "width_factors": (1, 1.5, 2), "smp_args": {"kernel_count": 5}, "dropout": 0.0}, 16,
    ),
    "ccnet": ({"dims": [4, 5, 6, 7, 8, 9, 10, 11]}, 32),
    "ccnet_baseline": ({"dims": [4, 5, 6, 7, 8, 9, 10, 11]}, 32),
}  # fmt: skip
#: channels and reduction of the features
FEATURES = {
    "smpconv_tiny": [(8, 4), (16, 8), (24, 16), (32, 32)],
    **{name: [(4, 1), (6, 1), (8, 1)] for name in ("flexnet3", "smpnet7")},
    "ccnet": [(4, 1), (7, 2), (11, 4)],
    "ccnet_baseline": [(4, 1), (10, 2), (11, 4)],
}
CONFIGURED = {
    **dict.fromkeys(("smpconv_tiny", "smpconv_base"), (1000, (3, 224, 224))),
    **dict.fromkeys(("flexnet3", "flexnet5", "flexnet7", "smpnet7", "ccnet", "ccnet_baseline"), (10, (3, 32, 32))),
}
every_network = pytest.mark.parametrize("name", SMALL)


def small(name: str, **options) -> nn.Module:
    return timm.create_model(name, **{**SMALL[name][0], "num_classes": 5, **options})


def images(name: str, channels: int = 3) -> torch.Tensor:
    size = SMALL[name][1]
    return torch.randn(2, channels, size, size)


@pytest.mark.parametrize("name", CONFIGURED)
def test_default_config_is_complete(name):
    config = get_pretrained_cfg(name)
    model = on_meta(name)
    assert config.architecture == name
    assert (config.num_classes, config.input_size) == CONFIGURED[name]
    assert model.num_classes == config.num_classes
    assert f"{config.classifier}.weight" in model.state_dict()
    assert model.get_submodule(config.first_conv).in_channels == 3


@every_network
def test_features_are_the_intermediate_ones(name):
    model, x = small(name).eval(), images(name)
    extractor = small(name, features_only=True).eval()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(("norm", "head"))}
    extractor.load_state_dict({_flat(key, extractor): value for key, value in state.items()})
    info, intermediates = extractor.feature_info, model.forward_intermediates(x, intermediates_only=True)
    assert list(zip(info.channels(), info.reduction(), strict=True)) == FEATURES[name]
    for feature, expected, (channels, reduction) in zip(extractor(x), intermediates, FEATURES[name], strict=True):
        torch.testing.assert_close(feature, expected)
        assert feature.shape[1:] == (channels, x.shape[2] // reduction, x.shape[3] // reduction)
    assert len(small(name, features_only=True, out_indices=(0, 2))(x)) == 2


def _flat(key: str, extractor: nn.Module) -> str:
    """The name of a parameter in timm's extractor, which takes the modules of a sequence out of it."""
    head, _, rest = key.partition(".")
    return key if head in dict(extractor.named_children()) else f"{head}_{rest}"


@every_network
def test_intermediates_are_those_that_are_asked_for(name):
    model, x = small(name).eval(), images(name)
    final, full = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    last, taken = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    torch.testing.assert_close(taken, full[:2])
    torch.testing.assert_close(last, full[1])
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, [final])
    with pytest.raises(ValueError, match="output_fmt='NLC': expected 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model(x), full[1])
    assert model.num_features == FEATURES[name][1][0]


@every_network
def test_options_and_the_head(name):
    model = small(name, num_classes=7, in_chans=1, drop_rate=0.1)
    x = images(name, 1)
    assert model(x).shape == (2, 7)
    features = model.eval().forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model(x).shape[1] == 3
    model.reset_classifier(4, "avg")
    assert model(x).shape == (2, 4)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


@every_network
def test_parameters_are_grouped_and_geometry_is_not_decayed(name):
    model = small(name)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    geometry = {id(parameter) for layer in layers_of(model) for parameter in layer.geometry.values()}
    exempt = model.no_weight_decay()
    assert exempt >= {n for n, parameter in model.named_parameters() if id(parameter) in geometry}
    assert {n.rsplit(".", 1)[-1] for n in exempt}.isdisjoint({"weight", "hidden_weight", "output_weight"})
    assert bool(geometry) == (name != "ccnet_baseline")


@every_network
def test_gradient_checkpointing_gives_equal_gradients(name):
    model, x = small(name), images(name)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        each(x).square().sum().backward()
    for (key, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@every_network
def test_a_model_is_one_graph(name, training):
    model, x = small(name).train(training), images(name)
    expected = model(x)
    torch._dynamo.reset()
    graphs = [torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=False)]
    if not training:
        graphs.append(torch.export.export(model, (x,)).module())
    for graph in graphs:
        torch.testing.assert_close(graph(x), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
