"""Warm start: layers that begin as the kernels that they replace."""

import copy
import time

import pytest
import timm
import torch
from timm_contconv.layers.least_squares import solve
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import DclsConv1d, DclsConv2d, DclsConv3d, GaussianEnvelopeConv2d, SmpConv1d, SmpConv2d
from timm_contconv.layers.dcls import DclsSpec
from timm_contconv.layers.envelope import EnvelopeSpec
from timm_contconv.layers.smp import SmpSpec

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DCLS = {1: DclsConv1d, 2: DclsConv2d, 3: DclsConv3d}


def relative(value, expected):
    return (torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected)).item()


def smooth_convs(channels: int, count: int) -> list[nn.Conv2d]:
    """Depthwise convolutions with kernels that fall off towards their rim, as trained ones do."""
    axis = torch.linspace(-1, 1, 7)
    window = torch.exp(-1.5 * (axis[:, None] ** 2 + axis**2))
    convs = [nn.Conv2d(channels, channels, 7, padding=3, groups=channels) for _ in range(count)]
    for conv in convs:
        conv.weight.data.mul_(window)
    return convs


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bilinear_dcls_with_an_element_per_pixel_is_exact(ndim, groups):
    conv = CONVS[ndim](4, 4, 3, padding=1, groups=groups)
    spec = DclsSpec(interpolation="bilinear", kernel_size=5, kernel_count=3**ndim + 2)
    layer = DCLS[ndim].from_conv(conv, spec)
    x = torch.randn(2, 4, *(9,) * ndim)
    assert relative(layer(x), conv(x)) < 1e-5
    assert layer.fit_error(conv) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"points": "layer"}, {"normalize": False}, {"small_kernel": 3}])
@pytest.mark.parametrize("groups", [1, 4])
def test_smp_with_a_point_per_pixel_is_exact(settings, groups):
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=groups)
    layer = SmpConv2d.from_conv(conv, SmpSpec(kernel_size=11, **settings))
    x = torch.randn(2, 4, 9, 10)
    assert relative(layer(x), conv(x)) < 1e-5


def test_smp_in_one_dimension_is_exact():
    conv = nn.Conv1d(4, 4, 5, padding=2)
    layer = SmpConv1d.from_conv(conv, SmpSpec(kernel_size=31))
    x = torch.randn(2, 4, 40)
    assert relative(layer(x), conv(x)) < 1e-5


def test_the_small_kernel_takes_what_the_points_are_too_few_for():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    few = {"kernel_size": 13, "kernel_count": 24}
    assert SmpConv2d.from_conv(conv, SmpSpec(**few)).fit_error(conv) > 1e-2
    assert SmpConv2d.from_conv(conv, SmpSpec(**few, small_kernel=5)).fit_error(conv) < 1e-5


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


def test_weights_are_those_of_a_least_squares_solver():
    torch.manual_seed(0)
    elements = torch.randn(3, 40, 6, dtype=torch.float64)  # pixels x elements
    kernels = torch.randn(3, 40, 2, dtype=torch.float64)
    expected = torch.linalg.lstsq(elements, kernels).solution
    torch.testing.assert_close(solve(elements.mT @ elements, elements.mT @ kernels), expected)


@pytest.mark.parametrize(("interpolation", "limit"), [("bilinear", 0.2), ("triangle", 0.15), ("gauss", 0.1)])
def test_half_as_many_elements_as_pixels_come_near(interpolation, limit):
    """Three layers of a stage, which share positions; the search must beat the best weights where it starts."""
    torch.manual_seed(0)
    convs = smooth_convs(16, 3)
    spec = DclsSpec(interpolation=interpolation, kernel_size=13, kernel_count=26)
    layers = [spec.build(conv, "random") for conv in convs]
    DclsConv2d.fit_(layers, convs)
    for layer in layers[1:]:
        layer.geometry = layers[0].geometry
    before_search = _at_start(convs, spec)
    errors = [layer.fit_error(conv) for layer, conv in zip(layers, convs, strict=True)]
    assert max(errors) < limit
    assert sum(errors) < 0.8 * sum(before_search)


def _at_start(convs: list[nn.Conv2d], spec: DclsSpec) -> list[float]:
    """Errors with an element on each of the 26 pixels that matter most and the best weights there: all other pixels."""
    kernels = torch.stack([conv.weight.detach()[:, 0].flatten(1) for conv in convs], 1)
    order = kernels.square().sum(1).argsort(1, descending=True)[:, spec.kernel_count :]
    lost = torch.gather(kernels, 2, order[:, None].expand(-1, len(convs), -1))
    return [(lost[:, i].norm() / kernels[:, i].norm()).item() for i in range(len(convs))]


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
    assert model[0].geometry is model[1].geometry
    assert relative(model(x), expected) < 1e-5


def test_a_kernel_larger_than_the_new_one_loses_its_rim():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    layer = DclsConv2d.from_conv(conv, DclsSpec(interpolation="bilinear", kernel_size=5, kernel_count=25))
    torch.testing.assert_close(layer.weight, conv.weight[..., 1:-1, 1:-1])
    lost = conv.weight.square().sum() - conv.weight[..., 1:-1, 1:-1].square().sum()
    assert layer.fit_error(conv) == pytest.approx((lost / conv.weight.square().sum()).sqrt().item(), rel=1e-4)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fitted_to_its_rounding(dtype):
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4, dtype=dtype)
    layer = SmpConv2d.from_conv(conv, SmpSpec(kernel_size=11))
    assert layer.weight.dtype == dtype
    assert layer.fit_error(conv) < 2 * torch.finfo(dtype).eps


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


def test_a_kernel_that_is_not_finite_is_refused():
    conv = nn.Conv2d(2, 2, 3)
    conv.weight.data[0, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="init='fit': 1 of 36 values of Conv2d.* are NaN or infinite"):
        DclsConv2d.from_conv(conv, DclsSpec(interpolation="gauss", kernel_size=5, kernel_count=3))
