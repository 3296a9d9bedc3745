"""CC-Net and its baseline: the paper's layers, and what timm asks of a model."""

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters
from torch import nn

from timm_contconv.layers import ContinuousConv2d
from timm_contconv.models.ccnet import CC_SCALE, ccnet

CCNETS = ("ccnet", "ccnet_baseline")
names = pytest.mark.parametrize("name", CCNETS)


def test_ccnet_has_the_papers_layers() -> None:
    model, baseline = ccnet(num_classes=5), timm.create_model("ccnet_baseline", num_classes=5)
    layers = [module for module in model.modules() if isinstance(module, ContinuousConv2d)]
    assert len(model.layers) == len(baseline.layers) == 8
    assert [layer.conv.stride[0] for layer in baseline.layers] == [1, 2, 1, 1, 1, 1, 1, 2]
    assert [float(layer.scale[0]) for layer in layers] == pytest.approx([0.25 ** (1 / 6)] * 6 + [1], rel=1e-9)
    assert pytest.approx(0.25 ** (1 / 6)) == CC_SCALE
    assert sum(isinstance(module, nn.Linear) for module in model.head.modules()) == 3
    x, sizes = torch.randn(1, 3, 32, 32), []
    for layer in model.layers:
        x = layer(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 25, 20, 16, 13, 10, 8, 8]
    assert model.head(x).shape == (1, 5)


@names
def test_it_does_what_timms_models_do(name: str) -> None:
    model = timm.create_model(name, num_classes=7, in_chans=1, dims=8, drop_rate=0.1)
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    model.eval()
    features, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert [y.shape[-1] for y in intermediates] == [32, 16, 8]
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.train().forward_features(x), features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(4, "avg")
    assert model(torch.randn(2, 1, 50, 40)).shape == (2, 4)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 8, 8, 8)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())


@names
def test_features(name: str) -> None:
    model = timm.create_model(name, features_only=True, out_indices=(1, 2), dims=[4, 5, 6, 7, 8, 9, 10, 11])
    assert model.feature_info.reduction() == [2, 4]
    features = model(torch.randn(1, 3, 32, 32))
    assert [tuple(y.shape) for y in features] == [
        (1, channels, size, size) for channels, size in zip(model.feature_info.channels(), (16, 8), strict=True)
    ]


@names
def test_configuration_is_complete(name: str) -> None:
    config, state = get_pretrained_cfg(name), timm.create_model(name, dims=4).state_dict()
    assert (config.architecture, config.input_size, config.num_classes) == (name, (3, 32, 32), 10)
    assert {f"{config.classifier}.weight", f"{config.first_conv}.weight"} <= state.keys()


@names
def test_variances_are_kept_and_hidden_layers_take_no_decay(name: str) -> None:
    model = timm.create_model(name, dims=32)
    assert 0.1 < float(model(torch.randn(4, 3, 32, 32)).detach().std()) < 3
    hidden = {key for key, _ in model.named_parameters() if ".net." in key and not key.endswith(".net.weight")}
    assert model.no_weight_decay() == hidden
    assert bool(hidden) == (name == "ccnet")


@names
def test_sizes_and_paths_that_it_does_not_have_are_refused(name: str) -> None:
    assert timm.create_model(name, img_size=48, dims=4, drop_path_rate=0.0)(torch.randn(1, 3, 48, 48)).shape == (1, 10)
    with pytest.raises(ValueError, match="img_size=30: expected multiples of 4"):
        timm.create_model(name, img_size=30)
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1: expected 0"):
        timm.create_model(name, dims=4, drop_path_rate=0.1)
