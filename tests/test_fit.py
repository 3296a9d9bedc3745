"""Warm start: layers that begin as the kernels that they replace."""

import copy
import time

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
from tests.helpers import relative
from timm_contconv.layers import DclsConv2d, GaussianEnvelopeConv2d, SmpConv2d
from timm_contconv.layers.envelope import EnvelopeSpec


@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"padding": "same"}])
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_envelope_starts_as_the_convolution_alone(settings, order):
    conv = nn.Conv2d(4, 6, 3, **settings)
    layer = GaussianEnvelopeConv2d.from_conv(conv, EnvelopeSpec(order=order))
    x = torch.randn(2, 4, 9, 10)
    assert relative(layer(x), conv(x)) < 1e-5
    assert layer.fit_error(conv) < 1e-5


def test_a_width_that_is_asked_for_is_not_fitted():
    layer = GaussianEnvelopeConv2d.from_conv(nn.Conv2d(4, 6, 3), EnvelopeSpec(initial_sigma=0.5))
    torch.testing.assert_close(layer.sigma, torch.full((4,), 0.5))


def test_a_fit_does_not_depend_on_the_random_state():
    model = timm.create_model("test_convnext")
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(tcc.patch(copy.deepcopy(model), "dcls_gauss").state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_layers_of_a_stage_with_kernels_of_other_sizes_share_positions():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4))
    x = torch.randn(2, 4, 9, 9)
    expected = model(x)
    tcc.patch(model, "dcls", kernel_size=9, kernel_count=25)
    assert model[0].geometry["position"] is model[1].geometry["position"]
    assert relative(model(x), expected) < 1e-5


def test_patch_keeps_what_a_model_has_learned():
    model = timm.create_model("test_convnext", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1)
        expected = model(x)
        tcc.patch(model, "smp", kernel_size=15)
        assert relative(model(x), expected) < 1e-4


@pytest.mark.parametrize(
    ("base", "recipe", "settings"), [("test_convnext", "smp", {"kernel_size": 15}), ("test_resnet", "genv", {})]
)
def test_unpatch_after_an_exact_fit_gives_the_model_back(base, recipe, settings):
    model = timm.create_model(base, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, text = model(x), str(model)
        tcc.unpatch(tcc.patch(model, recipe, **settings))
        assert str(model) == text
        assert relative(model(x), expected) < 1e-4


def test_the_report_tells_each_layers_error():
    model = timm.create_model("test_convnext")
    kernels = {name: module.weight.detach().clone() for name, module in model.named_modules() if name.endswith("dw")}
    tcc.patch(model, "dcls")
    rows = {row.name: row.fit_error for row in tcc.report(model).rows if row.fit_error is not None}
    assert rows.keys() == kernels.keys()
    for name, kernel in kernels.items():
        new = model.get_submodule(name).weight.detach()
        wanted = nn.functional.pad(kernel, (5, 5, 5, 5))
        assert rows[name] == pytest.approx(relative(new, wanted), rel=1e-3)


def test_a_random_start_has_no_error_to_tell():
    report = tcc.report(tcc.patch(timm.create_model("test_convnext"), "dcls", init="random"))
    assert {row.fit_error for row in report.rows} == {None}


def test_a_named_architecture_starts_at_random():
    assert tcc.report(timm.create_model("test_convnext_dcls")).rows[0].fit_error is None


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = timm.create_model("test_convnext")
    with pytest.raises(ValueError, match=r"on the meta device and hold no kernels; use init='random'"):
        tcc.patch(model, "dcls")
    assert not any(isinstance(module, DclsConv2d) for module in model.modules())


@pytest.mark.parametrize("recipe", ["dcls", "dcls_triangle", "dcls_gauss", "smp"])
def test_a_gradient_reaches_the_geometry_after_a_fit(recipe):
    model = tcc.patch(timm.create_model("test_convnext"), recipe)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    layers = [module for module in model.modules() if isinstance(module, (DclsConv2d, SmpConv2d))]
    assert layers
    assert all(parameter.grad.any() for layer in layers for parameter in layer.geometry.values())


def test_progress_is_shown_where_it_is_asked_for(capsys):
    tcc.patch(timm.create_model("test_convnext"), "dcls", progress=True)
    assert "fitting kernels" in capsys.readouterr().err
    tcc.patch(timm.create_model("test_convnext"), "dcls", progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dcls", "dcls_triangle", "dcls_gauss", "smp"])
def test_convnext_tiny_is_fitted_within_a_minute(recipe):
    model = timm.create_model("convnext_tiny")
    start = time.perf_counter()
    tcc.patch(model, recipe)
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("recipe", ["dcls", "dcls_gauss", "smp", "flex", "genv", "cc"])
@pytest.mark.parametrize("context", [lambda: torch.device("meta"), torch.inference_mode], ids=["device", "inference"])
def test_a_warm_start_is_the_same_whatever_surrounds_it(recipe, context):
    model = timm.create_model("test_resnet" if recipe in ("genv", "cc") else "test_convnext")
    options = {} if recipe in ("genv", "cc") else {"kernel_size": 9}
    options |= {"kernel_count": 10} if recipe.startswith("dcls") else {}
    other = copy.deepcopy(model)
    tcc.patch(model, recipe, **options)
    with context():
        tcc.patch(other, recipe, **options)
    for value, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected)
