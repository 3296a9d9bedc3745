"""The recipe `cc` on timm's models."""

from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import ContinuousConv2d


def cc_layers(model: nn.Module) -> dict[str, ContinuousConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ContinuousConv2d)}


@pytest.mark.parametrize("base", ["resnet18", "resnet34", "resnet50", "resnet101", "test_resnet"])
def test_every_strided_convolution_is_replaced_in_registered_models(base: str) -> None:
    with torch.device("meta"):
        plain, model = timm.create_model(base), timm.create_model(f"{base}_cc")
    strided = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    layers = cc_layers(model)
    assert list(layers) == list(strided)
    for name, conv in strided.items():
        assert layers[name].scale == tuple(Fraction(1, s) for s in conv.stride)
        assert layers[name].kernel_size == conv.kernel_size


def test_report_has_the_same_multiply_adds_and_the_error_of_a_smaller_support() -> None:
    whole, small = (tcc.report(tcc.patch(timm.create_model("resnet18"), "cc", kernel_size=size)) for size in (None, 1))
    assert whole.multiply_adds_after == whole.multiply_adds_before
    errors = {row.before: row.fit_error for row in small.rows}
    assert errors["Conv2d 1×1"] < 1e-6
    assert 0.8 < errors["Conv2d 3×3"] < 1


def test_layers_of_a_stage_can_share_their_hidden_layers() -> None:
    recipe, x = {**tcc.load_patch("cc").to_dict(), "select": ["all"]}, torch.randn(1, 3, 64, 64)
    plain, alone, shared = (timm.create_model("test_convnext", num_classes=5).eval() for _ in range(3))
    shared.load_state_dict(plain.state_dict())
    tcc.patch(alone, recipe)
    tcc.patch(shared, {**recipe, "share": "stage"})
    torch.testing.assert_close(shared(x), plain(x), rtol=1e-4, atol=1e-4)
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, shared, alone)]
    assert counts == sorted(set(counts))


def test_a_scale_set_later_is_reported_as_built_and_named_when_it_is_lost(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet_cc", num_classes=5).eval()
    before = tcc.report(model).multiply_adds_after
    (name, layer), *_ = cc_layers(model).items()
    layer.scale = 0.7
    assert tcc.report(model).multiply_adds_after == before
    with pytest.warns(UserWarning, match=f"saved without what was set on layers later.* {name} .scale=7/10, built"):
        tcc.save_pretrained(model, tmp_path / "saved")
    for undo in (tcc.merge, tcc.unpatch):
        with pytest.raises(ValueError, match=f"^{name}: scale=7/10: expected 1/"):
            undo(model)
    assert cc_layers(model)[name] is layer
