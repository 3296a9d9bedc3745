"""Figures draw what layers say: kernels, elements, distributions, frequencies."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import every_layer, spread_
from tests.models_for_tests import create
from timm_contconv.inspect import figures
from timm_contconv.inspect.figures.frequencies import spread_of_power
from timm_contconv.inspect.figures.kernels import window_of
from timm_contconv.layers import DclsConv2d


def panels(figure):
    """The panels of `kernels`, row by row: their data sets of pixels, outlines and dots."""
    rows = figure.to_dict()["vconcat"]
    return [[[layer["data"]["values"] for layer in panel["layer"]] for panel in row["hconcat"]] for row in rows]


def dcls() -> DclsConv2d:
    torch.manual_seed(0)
    return spread_(DclsConv2d(6, 6, 15, padding=7, groups=6, kernel_count=5))


def test_a_panel_holds_the_kernel_and_its_elements():
    layer = dcls()
    pixels, _, dots = panels(figures.kernels(nn.Sequential(layer), channels=6))[0][4]
    kernel = layer.weight.detach()[4, 0]
    drawn = torch.zeros_like(kernel)
    for square in pixels:
        drawn[round(square["y"] + 0.5), round(square["x"] + 0.5)] = square["v"]
    torch.testing.assert_close(drawn, kernel / kernel.abs().max(), atol=0.011, rtol=0)
    position = layer.geometry["position"][:, 4, 0].detach() + 7
    torch.testing.assert_close(torch.tensor([[d["y"], d["x"]] for d in dots]).T, position, atol=1e-3, rtol=0)
    weight = layer.kernel.weight.detach()[4, 0].abs()
    area = torch.tensor([d["s"] for d in dots])
    torch.testing.assert_close(area / area.max(), weight / weight.max())


def test_kernels_are_cropped_to_where_something_is():
    kernels = torch.zeros(2, 23, 23)
    kernels[0, 9, 12], kernels[1, 13, 10] = 1.0, -1.0
    window = window_of(kernels)
    assert (window.row, window.size) == (8, 7)  # rows 9 to 13 and a pixel around them
    assert torch.equal(window.cut(kernels).sum((1, 2)), torch.tensor([1.0, -1.0]))


def test_bars_hold_the_percentiles():
    layer = dcls()
    rows = figures.geometry(nn.Sequential(layer), "width σ of elements").to_dict()["data"]["values"]
    sigma = 0.27 + layer.geometry["sigma"].detach().abs().flatten().numpy()
    expected = [float(f"{np.percentile(sigma, q):.3g}") for q in (5, 25, 50, 75, 95)]
    assert [rows[0][f"q{q}"] for q in (5, 25, 50, 75, 95)] == pytest.approx(expected, rel=1e-2)


def test_the_frequency_of_a_wave_is_found():
    rows = torch.arange(32)
    waves = torch.stack([torch.cos(2 * math.pi * f * rows)[:, None].expand(32, 32) for f in (0.0625, 0.25)])
    found = spread_of_power(waves * torch.hann_window(32)[:, None] * torch.hann_window(32))
    assert found.tolist() == pytest.approx([0.0625, 0.25], abs=0.05)
    assert spread_of_power(waves, spacing=0.5).tolist() == pytest.approx((2 * spread_of_power(waves)).tolist())


@every_layer
def test_every_layer_has_pictures(make):
    torch.manual_seed(0)
    model = nn.Sequential(spread_(make()))
    for figure in (figures.kernels(model, channels=2), figures.footprints(model), figures.frequencies(model)):
        assert figure.to_dict()
    for name in figures.quantity_names(model):
        assert figures.geometry(model, name).to_dict()["data"]["values"]
    assert panels(figures.kernels(model, channels=2))[0][1][0]


def test_it_is_saved_as_a_picture(tmp_path):
    figure = figures.footprints(nn.Sequential(dcls()))
    assert figure.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert figure.to_array().shape[2] == 3
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg"):
        figure.save(tmp_path / "a.gif")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="this Sequential holds no layer of timm_contconv"):
        figures.kernels(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="expected one of .*width σ of elements"):
        figures.geometry(nn.Sequential(dcls()), "colour")
    with pytest.raises(ValueError, match="give the model at its start"):
        figures.movements(create("test_resnet_genv"), "σ of envelopes")
