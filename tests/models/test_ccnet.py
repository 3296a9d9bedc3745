"""CC-Net and its baseline: the paper's layers, and what timm asks of a model."""

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
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
def test_variances_are_kept_and_hidden_layers_take_no_decay(name: str) -> None:
    model = timm.create_model(name, dims=32)
    assert 0.1 < float(model(torch.randn(4, 3, 32, 32)).detach().std()) < 3
    hidden = {key for key, _ in model.named_parameters() if ".net." in key and not key.endswith(".net.weight")}
    assert model.no_weight_decay() == hidden
    assert bool(hidden) == (name == "ccnet")


def test_scales_that_are_no_strides_do_not_merge(tmp_path) -> None:
    model = timm.create_model("ccnet", dims=4).eval()
    with pytest.raises(ValueError, match=r"layers.1.conv: scale=760227/957826: expected 1/k.*merge=False"):
        tcc.export(model, tmp_path / "ccnet.pt2", "torch", input_size=(3, 32, 32))


@pytest.mark.slow
def test_scales_that_are_no_strides_are_exported_as_they_are(tmp_path) -> None:
    model = timm.create_model("ccnet", dims=4).eval()
    exported = tcc.export(model, tmp_path / "ccnet.pt2", "torch", merge=False, input_size=(3, 32, 32))
    assert max(check.error for check in exported.checks) < 1e-5


@names
def test_sizes_and_paths_that_it_does_not_have_are_refused(name: str) -> None:
    assert timm.create_model(name, img_size=48, dims=4, drop_path_rate=0.0)(torch.randn(1, 3, 48, 48)).shape == (1, 10)
    with pytest.raises(ValueError, match="img_size=30: expected multiples of 4"):
        timm.create_model(name, img_size=30)
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1: expected 0"):
        timm.create_model(name, dims=4, drop_path_rate=0.1)
