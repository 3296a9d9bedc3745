"""Whole models with Gaussian envelopes: recipes, rewiring, report, merging, pictures, mistakes."""

from pathlib import Path

import pytest
import timm
import torch
from scipy import special
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import GaussianEnvelopeConv2d
from timm_contconv.layers.envelope import EnvelopeSpec
from timm_contconv.train import shrink_envelopes, sigma_per_layer
from timm_contconv.viz import envelope_figure, save_kernel_figure


def small(name: str = "test_resnet_genv", **kwargs) -> nn.Module:
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def enveloped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, GaussianEnvelopeConv2d)]


# Recipes


@pytest.mark.parametrize("recipe", ["genv", "genv5"])
def test_recipes_are_registered_on_the_papers_networks(recipe: str) -> None:
    bases = ["resnet34", "resnet50", "resnet101", "resnext50_32x4d"]
    assert all(timm.is_model(f"{base}_{recipe}") for base in bases)


def test_every_strided_convolution_of_resnet50() -> None:
    expected = ["conv1", *(f"layer{n}.0.{path}" for n in (2, 3, 4) for path in ("conv2", "downsample.0"))]
    assert enveloped(on_meta("resnet50_genv")) == expected


@pytest.mark.parametrize(
    ("base", "strides"), [("resnet50", "conv2"), ("resnet34", "conv1"), ("resnext50_32x4d", "conv2")]
)
def test_five_layers_without_the_pool(base: str, strides: str) -> None:
    model = on_meta(f"{base}_genv5")
    expected = ["conv1", *(f"layer{n}.0.{path}" for n in (1, 2, 3, 4) for path in (strides, "downsample.0"))]
    assert enveloped(model) == expected
    assert all(model.get_submodule(name).stride == (2, 2) for name in expected)
    assert isinstance(model.maxpool, nn.Identity)
    features = on_meta(f"{base}_genv5", features_only=True)(torch.empty(1, 3, 64, 64, device="meta"))
    assert [x.shape[-1] for x in features] == [32, 16, 8, 4, 2]


def test_five_layers_with_deltas_are_the_network_without_its_pool() -> None:
    """Against the same blocks with their strides set by hand."""
    plain = timm.create_model("resnet34", num_classes=5).eval()
    model = tcc.patch(timm.create_model("resnet34", num_classes=5), "genv5", initial_sigma=0).eval()
    conv, norm = model.layer1[0].downsample
    plain.maxpool, plain.layer1[0].conv1.stride = nn.Identity(), (2, 2)
    plain.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, 2, bias=False), nn.BatchNorm2d(64)).eval()
    weights = {key: value for key, value in model.state_dict().items() if "geometry" not in key}
    plain.load_state_dict(weights)
    assert isinstance(conv, GaussianEnvelopeConv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), plain(x))


def test_weights_of_the_base_model_load() -> None:
    base, model = timm.create_model("test_resnet"), timm.create_model("test_resnet_genv")
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == [f"{name}.geometry.sigma" for name in enveloped(model)]


def test_any_other_model_takes_the_recipe() -> None:
    model = tcc.patch(timm.create_model("test_convnext", num_classes=5), "genv").eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_tensorflow_padding_is_replaced_at_the_same_positions() -> None:
    model = timm.create_model("tf_efficientnet_b0", num_classes=5).eval()
    weights, x = model.state_dict(), torch.randn(1, 3, 65, 65)
    expected = model(x)
    tcc.patch(model, "genv", initial_sigma=0).load_state_dict(weights, strict=False)
    torch.testing.assert_close(model.eval()(x), expected)


# Back to plain


def test_five_layers_are_undone() -> None:
    model = timm.create_model("resnet34", num_classes=5).eval()
    pool, keys = model.maxpool, list(model.state_dict())
    tcc.unpatch(tcc.patch(model, "genv5", initial_sigma=0))
    assert model.maxpool is pool
    assert model.layer1[0].conv1.stride == (1, 1)
    assert model.layer1[0].downsample is None
    assert list(model.state_dict()) == keys


def test_a_failed_patch_leaves_the_pool_and_the_strides() -> None:
    model = timm.create_model("resnet34", num_classes=5)
    pool = model.maxpool
    with pytest.raises(ValueError, match="matches no convolution"):
        tcc.patch(model, "genv5", select="nothing.*")
    assert model.maxpool is pool
    assert model.layer1[0].conv1.stride == (1, 1)
    assert model.layer1[0].downsample is None


@pytest.mark.parametrize(
    ("name", "reason"), [("test_convnext", "its `maxpool` is not"), ("resnet26d", "its blocks don't stride in one")]
)
def test_moving_the_pool_is_refused_elsewhere(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"stem_pool='to_stage': can't be done in this .*: {reason}"):
        tcc.patch(timm.create_model(name), "genv5")


def test_wide_envelopes_do_not_fit_back() -> None:
    with pytest.raises(ValueError, match=r"reach beyond the original size: conv1.0 \(\(11, 11\) into \(3, 3\)\)"):
        tcc.unpatch(small())


def test_merged_model_has_depthwise_passes_and_the_same_output() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    merged = tcc.merge(model)
    assert [conv.groups for conv in merged.get_submodule("layer2.0.conv1")] == [32, 32, 1]
    torch.testing.assert_close(merged(x), model(x))


def test_dense_merge_is_one_convolution_each_and_equal_away_from_borders() -> None:
    model, x = small(), torch.zeros(1, 3, 96, 96)
    x[..., 40:56, 40:56] = torch.randn(16, 16)
    dense = tcc.merge(model, dense=True)
    assert dense.get_submodule("layer2.0.conv1").kernel_size == (11, 11)
    assert sum(isinstance(m, nn.Conv2d) for m in dense.modules()) == sum(
        isinstance(m, nn.Conv2d) for m in model.modules()
    )
    torch.testing.assert_close(dense.conv1(x), model.conv1(x))


# Cost


@pytest.mark.parametrize(("size", "formula", "paper"), [(9, 40_642_560, 0.05e9), (3, 13_547_520, 0.02e9)])
def test_multiply_adds_on_resnet50_are_the_papers(size: int, formula: int, paper: float) -> None:
    """The paper's figures are differences of two numbers rounded to 0.01 G, so they are good to 0.01 G."""
    report = tcc.report(on_meta("resnet50_genv", patch_args={"inference_size": size}))
    assert report.multiply_adds_published - report.multiply_adds_before == formula
    assert formula == pytest.approx(paper, abs=0.01e9)


def test_strides_in_the_passes_spare_multiply_adds() -> None:
    report = tcc.report(on_meta("resnet50_genv"))
    row = next(row for row in report.rows if row.name == "layer2.0.downsample.0")
    assert row.multiply_adds_after - row.multiply_adds_before == 9 * 256 * 56 * 56 * 3 // 4  # of 2 * 9 * 256 * 56 * 56
    rows = sum(row.multiply_adds_after - row.multiply_adds_before for row in report.rows)
    assert report.multiply_adds_after - report.multiply_adds_before == rows == 24_837_120


def test_report_counts_what_moving_the_pool_changes() -> None:
    base = timm.create_model("resnet34")
    report = tcc.report(tcc.patch(timm.create_model("resnet34"), "genv5"))
    assert report.parameters_before == sum(p.numel() for p in base.parameters())
    assert {row.name for row in report.rows} > {"maxpool", "layer1.0.downsample"}
    added = sum(row.parameters_after - row.parameters_before for row in report.rows)
    assert report.parameters_after - report.parameters_before == added
    assert "MaxPool2d" in str(report)


# Sigma


def test_sigma_is_reported_by_layer() -> None:
    model = small()
    with torch.no_grad():
        model.conv1[0].geometry["sigma"].copy_(torch.tensor([-1.0, 0.0, 1.0]))
    expected = [special.softplus(value) ** 0.5 for value in (-1, 0, 1)]
    summary = sigma_per_layer(model)
    assert list(summary) == enveloped(model)
    assert summary["conv1.0"]["min"] == pytest.approx(expected[0], rel=1e-6)
    assert summary["conv1.0"]["max"] == pytest.approx(expected[2], rel=1e-6)
    assert summary["conv1.0"]["mean"] == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_sigma_is_not_decayed() -> None:
    model = small()
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.5)
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert {decay[f"{name}.geometry.sigma"] for name in enveloped(model)} == {0.0}


def test_shrinking_a_model_is_the_recipes_inference_size() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    recipe = small(patch_args={"inference_size": 3})
    recipe.load_state_dict(model.state_dict())
    full = model(x)
    torch.testing.assert_close(shrink_envelopes(model, 3)(x), recipe(x))
    assert torch.equal(shrink_envelopes(model, 9)(x), full)


def test_shrinking_too_far_changes_nothing() -> None:
    model = small()
    with pytest.raises(ValueError, match="size=11: expected an odd int from 3 to 9"):
        shrink_envelopes(model, 11)
    assert {model.get_submodule(name).inference_size for name in enveloped(model)} == {9}


def test_shrinking_a_half_pixel_envelope_hardly_changes_logits() -> None:
    model = small(patch_args={"initial_sigma": 0.5}).train()
    with torch.no_grad():
        model(torch.randn(32, 3, 64, 64))
        x = torch.randn(8, 3, 64, 64)
        full = model.eval()(x)
        change = shrink_envelopes(model, 3)(x) - full
    assert change.std() < 0.01 * full.std()


def test_a_model_without_envelopes_is_named() -> None:
    model = timm.create_model("test_resnet")
    for function in (sigma_per_layer, envelope_figure, lambda m: shrink_envelopes(m, 3)):
        with pytest.raises(ValueError, match="this ResNet holds no GaussianEnvelopeConv2d"):
            function(model)


# Pictures and folders


def test_figure_shows_every_sigma_and_envelope() -> None:
    model = small()
    widths, curves = envelope_figure(model).axes
    dots = [line.get_ydata() for line in widths.lines if line.get_marker() == "."]
    assert [len(sigma) for sigma in dots] == [3, 32, 48, 192]
    torch.testing.assert_close(torch.tensor(curves.lines[0].get_ydata()).sum(), torch.tensor(1.0))


def test_kernel_figure_of_such_a_model_is_that_of_its_envelopes(tmp_path: Path) -> None:
    assert save_kernel_figure(small(), tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model, x = small("resnet18_genv"), torch.randn(1, 3, 64, 64)
    loaded = tcc.from_pretrained(tcc.save_pretrained(model, tmp_path / "model"))
    assert torch.equal(loaded.eval()(x), model(x))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"envelope_size": 4}, "envelope_size=4: expected an odd int from 3 to 255"),
        ({"inference_size": 11}, "inference_size=11: expected an odd int from 3 to 9"),
        ({"order": "conv"}, "order='conv': expected 'before' or 'after'"),
        ({"sigma_per": "pixel"}, "sigma_per='pixel': expected 'channel' or 'layer'"),
        ({"initial_sigma": -1.0}, "initial_sigma=-1.0: expected a width of 0 to 255 pixels"),
        ({"stride": 2, "padding": "same", "padding_mode": "reflect"}, "padding_mode='reflect': expected 'zeros'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianEnvelopeConv2d(4, 6, 3, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"envelope_size": 8}, "expected an odd int"),
        ({"inference_size": 11}, "inference_size=11: expected an odd int from 3 to 9"),
        ({"initial_sigma": 1e6}, "less than or equal to 255"),
    ],
)
def test_recipes_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvelopeSpec(**settings)


def test_other_dimensions_are_refused_and_dilation_is_not() -> None:
    spec = EnvelopeSpec()
    assert spec.refusal(nn.Conv1d(4, 4, 3, 2)) == "genv has no 1-D layer"
    assert spec.refusal(nn.Conv2d(4, 4, 3, dilation=2)) is None
