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


def network(name: str = "test_resnet") -> nn.Module:
    """In eval mode, with batch norms as after training, so that nothing is hidden by them being the identity."""
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


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


@pytest.mark.parametrize(
    ("base", "sizes"),
    [
        ("resnet18", [(64, 64), (65, 63), (33, 97)]),
        ("test_resnet", [(64, 64), (65, 63)]),
        ("test_convnext", [(64, 96)]),  # patches, downsampling by 2x2 kernels
        ("tf_efficientnet_b0", [(64, 64), (65, 64)]),  # TensorFlow's padding
    ],
)
def test_a_patched_network_starts_with_the_same_logits_and_gives_them_back(base: str, sizes: list) -> None:
    model = network(base)
    inputs = [torch.randn(1, 3, *size) for size in sizes]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        report = tcc.report(tcc.patch(model, "cc"))
        assert cc_layers(model)
        assert all(row.fit_error < 1e-5 for row in report.rows)
        for x, y in zip(inputs, expected, strict=True):
            assert (model(x) - y).abs().max() <= 1e-4 * y.abs().max()
        merged = tcc.merge(model)
        assert not cc_layers(merged)
        torch.testing.assert_close(merged(inputs[0]), expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tcc.unpatch(model)(inputs[0]), expected[0], rtol=1e-4, atol=1e-4)
    assert not cc_layers(model)


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


def test_a_patched_network_trains_without_decay_of_hidden_layers() -> None:
    model = tcc.patch(timm.create_model("test_resnet", num_classes=5), "cc").train()
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    groups = tcc.param_groups(model, 1e-2, 0.5)
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decay["layer2.0.conv1.net.weight_2"] == 0
    assert decay["layer2.0.conv1.net.weight"] == 0.5
    optimizer = torch.optim.AdamW(tcc.param_groups(model, 1e-2, 0.0))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(value.grad is not None for layer in cc_layers(model).values() for value in layer.parameters())


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
