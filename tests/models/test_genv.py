"""Whole models with Gaussian envelopes: recipes, rewiring, report, merging, pictures."""

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.inspect import figures
from timm_contconv.layers.envelope import GaussianEnvelopeConv2d, shrink_envelopes

from ..models_for_tests import on_meta


def seen(model: nn.Module) -> nn.Module:
    """The model in eval mode, all norms at 1: the last one of a residual path starts at 0, which hides the path."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model.eval()


def small(name: str = "test_resnet_genv", **kwargs) -> nn.Module:
    return seen(timm.create_model(name, num_classes=5, **kwargs))


def enveloped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, GaussianEnvelopeConv2d)]


# Recipes


def test_every_strided_convolution_of_resnet50() -> None:
    expected = ["conv1", *(f"layer{n}.0.{path}" for n in (2, 3, 4) for path in ("conv2", "downsample.0"))]
    assert enveloped(on_meta("resnet50_genv")) == expected


@pytest.mark.parametrize(
    ("base", "strides"),
    [("resnet50", "conv2"), ("resnet34", "conv1"), ("resnet101", "conv2"), ("resnext50_32x4d", "conv2")],
)
def test_five_layers_without_the_pool(base: str, strides: str) -> None:
    assert timm.is_model(f"{base}_genv")
    model = on_meta(f"{base}_genv5")
    expected = ["conv1", *(f"layer{n}.0.{path}" for n in (1, 2, 3, 4) for path in (strides, "downsample.0"))]
    assert enveloped(model) == expected
    assert all(model.get_submodule(name).stride == (2, 2) for name in expected)
    assert isinstance(model.maxpool, nn.Identity)
    features = on_meta(f"{base}_genv5", features_only=True)(torch.empty(1, 3, 64, 64, device="meta"))
    assert [x.shape[-1] for x in features] == [32, 16, 8, 4, 2]


# Back to plain


def test_merged_model_has_depthwise_passes_and_the_same_output() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    merged = tcc.merge(model)
    assert [conv.groups for conv in merged.get_submodule("layer2.0.conv1")] == [32, 32, 1]
    torch.testing.assert_close(merged(x), model(x))


def test_dense_merge_is_one_convolution_each_and_equal_away_from_borders() -> None:
    model, x = small(), torch.zeros(1, 3, 96, 96)
    x[..., 40:56, 40:56] = torch.randn(16, 16)
    dense = tcc.merge(model, dense=True)
    assert all(type(dense.get_submodule(name)) is nn.Conv2d for name in enveloped(model))
    assert dense.get_submodule("layer2.0.conv1").kernel_size == (11, 11)
    torch.testing.assert_close(dense.conv1(x), model.conv1(x))


# Cost


@pytest.mark.parametrize(("size", "formula", "paper"), [(9, 40_642_560, 0.05e9), (3, 13_547_520, 0.02e9)])
def test_multiply_adds_on_resnet50_are_the_papers(size: int, formula: int, paper: float) -> None:
    """The paper's figures are differences of two numbers rounded to 0.01 G, so they are good to 0.01 G."""
    report = tcc.report(on_meta("resnet50_genv", patch_args={"inference_size": size}))
    assert report.multiply_adds_published - report.multiply_adds_before == formula
    assert formula == pytest.approx(paper, abs=0.01e9)
    row = next(row for row in report.rows if row.name == "layer2.0.downsample.0")
    assert row.multiply_adds_after - row.multiply_adds_before == size * 256 * 56 * 56 * 3 // 4  # of 2 * size * ...


# Training, pictures, folders


def test_shrinking_a_half_pixel_envelope_hardly_changes_logits() -> None:
    model = small(patch_args={"initial_sigma": 0.5}).train()
    with torch.no_grad():
        model(torch.randn(32, 3, 64, 64))
        x = torch.randn(8, 3, 64, 64)
        full = model.eval()(x)
        change = shrink_envelopes(model, 3)(x) - full
    assert change.std() < 0.01 * full.std()


def test_figure_shows_the_sigma_of_every_layer() -> None:
    model = small()
    rows = figures.geometry(model, "σ of envelopes").to_dict()["data"]["values"]
    medians = [model.get_submodule(name).sigma.quantile(0.5).item() for name in enveloped(model)]
    assert [row["q50"] for row in rows] == pytest.approx(medians, abs=0.01)
