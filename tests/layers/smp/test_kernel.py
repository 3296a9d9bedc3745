"""SMP kernels are those of the paper's equations; fits of them."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import relative, spread_
from timm_contconv.layers import SmpConv1d, SmpConv2d
from timm_contconv.layers.smp import SmpSpec, smp_kernel, smp_sum_kernel


def direct_kernel(layer: SmpConv1d | SmpConv2d) -> np.ndarray:
    """Eq. 1 and 2, one pixel, filter and point at a time, in float64; without the small kernel."""
    weight, coordinate, radius = (
        t.detach().double().numpy() for t in (layer.kernel.weight, layer.kernel.coordinate, layer.kernel.radius)
    )
    axes = [np.linspace(-1, 1, size) for size in layer.kernel_size]
    kernel = np.zeros((*weight.shape[:2], *layer.kernel_size))
    for out, pixel in itertools.product(range(weight.shape[0]), np.ndindex(*layer.kernel_size)):
        points = out if coordinate.shape[0] > 1 else 0
        x = np.array([axis[i] for axis, i in zip(axes, pixel, strict=True)])
        total, neighbours = np.zeros(weight.shape[1]), 0
        for i in range(weight.shape[2]):
            g = 1 - np.abs(x - coordinate[points, i]).sum() / radius[points, i]
            if g > 0:
                total, neighbours = total + g * weight[out, :, i], neighbours + 1
        kernel[(out, slice(None), *pixel)] = total / max(neighbours, 1) if layer.kernel.normalize else total
    return kernel


def make(**options) -> SmpConv2d:
    layer = spread_(SmpConv2d(8, 8, **{"kernel_size": 7, "padding": 3, "groups": 8, "kernel_count": 9, **options}))
    nn.init.normal_(layer.kernel.weight)
    return layer


# ---- the kernel


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 8), min_size=1, max_size=2),
    channels=st.sampled_from([(1, 1, 1), (4, 4, 4), (4, 6, 2), (3, 2, 1)]),
    count=st.integers(1, 12),
    points=st.sampled_from(["filter", "layer"]),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_construction_equals_a_direct_evaluation_of_the_equations(sizes, channels, count, points, normalize, seed):
    torch.manual_seed(seed)
    in_channels, out_channels, groups = channels
    options = {"groups": groups, "kernel_count": count, "points": points, "normalize": normalize}
    layer = (SmpConv1d, SmpConv2d)[len(sizes) - 1](in_channels, out_channels, sizes, **options, dtype=torch.float64)
    spread_(layer)
    np.testing.assert_allclose(layer.kernel().detach().numpy(), direct_kernel(layer), rtol=1e-9, atol=1e-11)


def test_float32_construction_agrees_with_float64_at_31_by_31():
    layer = make(kernel_size=31, points="layer", normalize=False)
    np.testing.assert_allclose(layer.kernel().detach().numpy(), direct_kernel(layer), atol=2e-4)


@pytest.mark.parametrize("kernel", [smp_kernel, smp_sum_kernel])
def test_kernel_gradients(kernel):
    weight = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    coordinate = torch.rand(3, 5, 2, dtype=torch.float64, requires_grad=True)
    radius = (0.3 + torch.rand(3, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: kernel(*inputs, (5, 4)), (weight, coordinate, radius))


def test_a_pixel_that_no_point_reaches_is_zero():
    layer = SmpConv2d(1, 1, 5, kernel_count=1)
    for name, value in (("coordinate", 0), ("radius", 0.6), ("weight", 3)):
        nn.init.constant_(getattr(layer.kernel, name), value)
    expected = torch.zeros(5, 5)
    expected[2, 2], expected[2, 1:4:2], expected[1:4:2, 2] = 3, 3 * (1 - 0.5 / 0.6), 3 * (1 - 0.5 / 0.6)
    torch.testing.assert_close(layer.weight[0, 0].detach(), expected)


def test_shared_points_are_constructed_by_one_matrix_product():
    products = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append([tuple(a.shape) for a in args])
            return function(*args, **(kwargs or {}))

    layer = SmpConv2d(64, 64, 15, groups=64, kernel_count=20, points="layer")
    with Record():
        layer.kernel()
    assert products == [[(1, 64, 20), (1, 20, 225)]]


def test_a_small_kernel_is_added_at_the_centre():
    layer = make(small_kernel=3)
    expected = torch.from_numpy(direct_kernel(layer)).float()
    expected[:, :, 2:5, 2:5] += layer.kernel.small_weight.detach()
    torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("radius", [0.0, -0.5])
def test_a_radius_of_zero_or_less_gives_a_finite_kernel_and_finite_gradients(radius):
    layer = make()
    nn.init.constant_(layer.kernel.radius, radius)
    layer.kernel.coordinate.data[0, 0] = 0  # on a pixel: 0 / 0 without care
    kernel = layer.kernel()
    kernel.square().sum().backward()
    assert kernel.isfinite().all()
    assert kernel[0, 0, 3, 3] == layer.kernel.weight[0, 0, 0]
    assert all(p.grad.isfinite().all() for p in layer.kernel.parameters())


@pytest.mark.parametrize("name", ["coordinate", "radius"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_points_that_are_not_finite_are_refused(name, value, training):
    layer, x = make().train(training), torch.randn(2, 8, 12, 11)
    layer(x)
    layer.geometry[name].data.view(-1)[:2] = value
    with pytest.raises(ValueError, match=rf"{name}: 2 of \d+ values are NaN or infinite.*earlier checkpoint"):
        layer(x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.to_conv()


# ---- initial values, constraint, arguments


def test_initial_values_are_those_of_the_released_imagenet_code():
    layer = SmpConv2d(96, 96, 31, groups=96, points="layer", normalize=False, coordinate_std=0.2, min_radius=1e-3)
    weight, coordinate, radius = layer.kernel.weight, layer.kernel.coordinate, layer.kernel.radius
    assert (weight.shape, coordinate.shape, radius.shape) == ((96, 1, 240), (1, 240, 2), (1, 240))
    assert (radius == 2 * (2 / 31)).all()
    assert coordinate.std().item() == pytest.approx(0.2, rel=0.15)
    assert coordinate.abs().max() <= 1
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layer.bias.any()


def test_causal_points_start_at_the_newest_samples():
    coordinate = SmpConv1d(2, 300, 64, coordinate_std=0.1).kernel.coordinate.detach()
    assert coordinate.shape == (300, 30, 1)
    assert coordinate.min() >= -1
    assert coordinate.max() <= 1
    distance = 1 - coordinate  # twice the absolute value of a normal with the standard deviation
    assert distance.mean().item() == pytest.approx(2 * 0.1 * math.sqrt(2 / math.pi), rel=0.05)


@pytest.mark.parametrize("min_radius", [1e-4, 1e-3])
def test_constraint_clips_radii_and_leaves_coordinates_free(min_radius):
    layer = make(min_radius=min_radius)
    layer.kernel.radius.data[0, :3] = torch.tensor([-1.0, 0.0, 5.0])
    nn.init.constant_(layer.kernel.coordinate, 7)
    layer.constrain_()
    assert layer.kernel.radius[0, :3].tolist() == pytest.approx([min_radius, min_radius, 1])
    assert (layer.kernel.coordinate == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_count": 0}, "kernel_count=0: expected at least 1"),
        ({"points": "each"}, "points='each': expected 'filter' or 'layer'"),
        ({"normalize": "x"}, "normalize='x': expected True or False"),
        ({"coordinate_std": 0}, "coordinate_std=0: expected more than 0"),
        ({"coordinate_std": math.nan}, "coordinate_std=nan: expected"),
        ({"min_radius": 0}, "min_radius=0: expected at least 0.0001"),
        ({"initial_radius": 2.0}, "initial_radius=2.0: expected at most 1.0"),
        ({"small_kernel": 4}, "small_kernel=4: expected at most the kernel_size (7, 7), and odd or even as"),
        ({"small_kernel": 9}, "small_kernel=9: expected at most the kernel_size"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(**options)


def test_a_causal_small_kernel_ends_at_the_newest_sample():
    layer = SmpConv1d(2, 2, 8, small_kernel=3)
    whole, small = layer.weight, layer.kernel.small_weight
    with torch.no_grad():
        small.zero_()
    torch.testing.assert_close(layer.weight[..., :5], whole[..., :5])
    with torch.no_grad():
        layer.kernel.weight.zero_()
        small.copy_(torch.randn(2, 2, 3))
    torch.testing.assert_close(layer.weight, torch.nn.functional.pad(small, (5, 0)))
    with pytest.raises(ValueError, match=r"small_kernel=9: expected at most the kernel_size \(8,\)$"):
        SmpConv1d(2, 2, 8, small_kernel=9)


def test_a_causal_kernel_with_a_small_one_is_fitted():
    kernel, target = SmpConv1d(2, 2, 8, small_kernel=3, kernel_count=5).kernel, torch.randn(2, 2, 8)
    kernel.fit_([kernel], [target])  # five points for the five older samples
    assert relative(kernel(), target) < 1e-4


@pytest.mark.parametrize(("learn", "names"), [("coordinates", {"coordinate"}), ("radius", {"radius"})])
def test_what_shall_not_learn_is_frozen(learn, names):
    layer = make(**{f"learn_{learn}": False})
    frozen = {name for name, value in layer.geometry.items() if not value.requires_grad}
    assert frozen == names
    layer(torch.randn(1, layer.in_channels, 9, 9)).sum().backward()
    assert all((value.grad is None) == (name in names) for name, value in layer.geometry.items())
    with pytest.raises(ValueError, match=f"learn_{learn}=1: expected True or False"):
        make(**{f"learn_{learn}": 1})


# ---- fits


@pytest.mark.parametrize("settings", [{}, {"points": "layer"}, {"normalize": False}, {"small_kernel": 3}])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_fit_with_a_point_per_pixel_is_exact(settings, groups):
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=groups)
    layer = SmpConv2d.from_conv(conv, SmpSpec(kernel_size=11, **settings))
    x = torch.randn(2, 4, 9, 10)
    assert relative(layer(x), conv(x)) < 1e-5


def test_a_fit_in_one_dimension_is_exact():
    conv = nn.Conv1d(4, 4, 5, padding=2)
    layer = SmpConv1d.from_conv(conv, SmpSpec(kernel_size=31))
    x = torch.randn(2, 4, 40)
    assert relative(layer(x), conv(x)) < 1e-5


def test_the_small_kernel_takes_what_the_points_are_too_few_for():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    few = {"kernel_size": 13, "kernel_count": 24}
    assert SmpConv2d.from_conv(conv, SmpSpec(**few)).fit_error(conv) > 1e-2
    assert SmpConv2d.from_conv(conv, SmpSpec(**few, small_kernel=5)).fit_error(conv) < 1e-5
