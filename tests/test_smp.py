"""SMP kernels are those of the paper's equations, and the layers keep the contract of the package."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from benchmarks.smp_fit import fit, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve
from timm_contconv.layers.replacement import share_geometry
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import timm_contconv as tcc
from timm_contconv.layers import SmpConv1d, SmpConv2d
from timm_contconv.layers.smp import SmpSpec, smp_kernel, smp_sum_kernel

KINDS = [{}, {"points": "layer"}, {"normalize": False}, {"points": "layer", "normalize": False, "small_kernel": 3}]


def direct_kernel(layer: SmpConv1d | SmpConv2d) -> np.ndarray:
    """Eq. 1 and 2, one pixel, filter and point at a time, in float64; without the small kernel."""
    weight, coordinate, radius = (
        t.detach().double().numpy() for t in (layer.point_weight, layer.coordinate, layer.radius)
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
        kernel[(out, slice(None), *pixel)] = total / max(neighbours, 1) if layer.normalize else total
    return kernel


def spread(layer):
    """Points all over the kernel and beyond, with all radii."""
    with torch.no_grad():
        layer.coordinate.uniform_(-1.2, 1.2)
        layer.radius.uniform_(0.05, 1)
        layer.point_weight.normal_()
    return layer


def make(**options) -> SmpConv2d:
    defaults = {"kernel_size": 7, "padding": 3, "groups": 8, "kernel_count": 9}
    return spread(SmpConv2d(8, 8, **{**defaults, **options}))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 12, 11)


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
    layer_type = (SmpConv1d, SmpConv2d)[len(sizes) - 1]
    in_channels, out_channels, groups = channels
    layer = layer_type(
        in_channels, out_channels, sizes, groups=groups, kernel_count=count, points=points, normalize=normalize
    )
    spread(layer.double())
    np.testing.assert_allclose(layer.construct().detach().numpy(), direct_kernel(layer), rtol=1e-9, atol=1e-11)


def test_float32_construction_agrees_with_float64_at_31_by_31():
    layer = spread(SmpConv2d(4, 4, 31, groups=4, points="layer", normalize=False))
    np.testing.assert_allclose(layer.construct().detach().numpy(), direct_kernel(layer), atol=2e-4)


@pytest.mark.parametrize("kernel", [smp_kernel, smp_sum_kernel])
def test_kernel_gradients(kernel):
    weight = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    coordinate = torch.rand(3, 5, 2, dtype=torch.float64, requires_grad=True)
    radius = (0.3 + torch.rand(3, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: kernel(*inputs, (5, 4)), (weight, coordinate, radius))


def test_a_pixel_that_no_point_reaches_is_zero():
    layer = SmpConv2d(1, 1, 5, kernel_count=1)
    with torch.no_grad():
        layer.coordinate.zero_()
        layer.radius.fill_(0.6)
        layer.point_weight.fill_(3)
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
        layer.construct()
    assert products == [[(1, 64, 20), (1, 20, 225)]]


def test_a_small_kernel_is_added_at_the_centre():
    layer = make(small_kernel=3)
    expected = torch.from_numpy(direct_kernel(layer)).float()
    expected[:, :, 2:5, 2:5] += layer.small_weight.detach()
    torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-5, rtol=1e-5)


# ---- initial values and constraints


def test_initial_values_are_those_of_the_released_imagenet_code():
    layer = SmpConv2d(96, 96, 31, groups=96, points="layer", normalize=False, coordinate_std=0.2, min_radius=1e-3)
    assert layer.coordinate.shape == (1, 240, 2)
    assert layer.point_weight.shape == (96, 1, 240)
    assert (layer.radius == 2 * (2 / 31)).all()
    assert layer.coordinate.std().item() == pytest.approx(0.2, rel=0.15)
    assert layer.coordinate.abs().max() <= 1
    assert layer.point_weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (layer.bias == 0).all()


def test_causal_points_start_at_the_newest_samples():
    coordinate = SmpConv1d(2, 300, 64, coordinate_std=0.1).coordinate.detach()
    assert coordinate.shape == (300, 30, 1)
    assert coordinate.min() >= -1
    assert coordinate.max() <= 1
    distance = 1 - coordinate  # twice the absolute value of a normal with the standard deviation
    assert distance.mean().item() == pytest.approx(2 * 0.1 * math.sqrt(2 / math.pi), rel=0.05)


@pytest.mark.parametrize("min_radius", [1e-4, 1e-3])
def test_constraint_clips_radii_and_leaves_coordinates_free(min_radius):
    model = nn.Sequential(make(min_radius=min_radius))
    with torch.no_grad():
        model[0].radius[0, :3] = torch.tensor([-1.0, 0.0, 5.0])
        model[0].coordinate.fill_(7)
    tcc.constrain_(model)
    assert model[0].radius[0, :3].tolist() == pytest.approx([min_radius, min_radius, 1])
    assert (model[0].coordinate == 7).all()


def test_points_are_not_decayed():
    groups = tcc.param_groups(nn.Sequential(make()), lr=1.0, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decay["0.geometry.coordinate"] == decay["0.geometry.radius"] == 0
    assert decay["0.point_weight"] == 0.1


@pytest.mark.parametrize("radius", [0.0, -0.5])
def test_a_radius_of_zero_or_less_gives_a_finite_kernel_and_finite_gradients(radius):
    layer = make()
    with torch.no_grad():
        layer.radius.fill_(radius)
        layer.coordinate[0, 0] = 0  # on a pixel: 0 / 0 without care
    kernel = layer.construct()
    kernel.square().sum().backward()
    assert kernel.isfinite().all()
    assert kernel[0, 0, 3, 3] == layer.point_weight[0, 0, 0]
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["coordinate", "radius"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_points_that_are_not_finite_are_refused(name, value, training, x):
    layer = make().train(training)
    layer(x)
    with torch.no_grad():
        layer.geometry[name].view(-1)[:2] = value
    with pytest.raises(ValueError, match=rf"{name}: 2 of \d+ values are NaN or infinite.*earlier checkpoint"):
        layer(x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.to_conv()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_count": 0}, "kernel_count=0: expected a positive int"),
        ({"kernel_size": 0}, "kernel_size=0: expected a positive int"),
        ({"points": "each"}, "points='each': expected 'filter'"),
        ({"coordinate_std": 0}, "coordinate_std=0: expected more than 0"),
        ({"coordinate_std": math.nan}, "coordinate_std=nan: expected"),
        ({"min_radius": 0}, "min_radius=0: expected 0.0001 to 1.0"),
        ({"initial_radius": 2.0}, "initial_radius=2.0: expected 0.0001 to 1.0"),
        ({"small_kernel": 4}, "small_kernel=4: expected at most the kernel_size"),
        ({"small_kernel": 9}, "small_kernel=9: expected at most the kernel_size"),
        ({"dilation": 2}, "dilation=2: expected 1"),
        ({"padding": "causal"}, "padding='causal': expected"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match="expected") as caught:
        make(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("options", [{"padding_mode": "reflect"}, {"small_kernel": 3}])
def test_what_causal_convolutions_do_not_have_is_refused(options):
    with pytest.raises(ValueError, match="causal"):
        SmpConv1d(2, 2, 8, **options)


# ---- the convolution


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 1}, {"groups": 2, "stride": 2}, {"padding": "same", "kernel_size": (5, 9)}, {"bias": False}],
)
def test_layer_convolves_with_its_weight_and_turns_into_a_plain_convolution(kind, options, x):
    layer = make(**kind, **options)
    plain = {k: v for k, v in options.items() if k != "kernel_size"}
    arguments = {"padding": 3, "groups": 8, "stride": 1, **plain}
    arguments.pop("bias", None)
    expected = F.conv2d(x, layer.weight, layer.bias, **arguments)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.to_conv()(x), expected, atol=1e-4, rtol=1e-4)


def test_causal_output_has_the_length_of_the_input_and_does_not_see_the_future():
    layer = spread(SmpConv1d(3, 4, 20))
    x = torch.randn(2, 3, 20)
    other = x.clone()
    other[..., 12:] = torch.randn(2, 3, 8)
    y, y_other = layer(x), layer(other)
    assert y.shape == (2, 4, 20)
    torch.testing.assert_close(y[..., :12], y_other[..., :12])
    assert (y[..., 12:] - y_other[..., 12:]).abs().max() > 0.1
    torch.testing.assert_close(layer.to_conv()(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_causal_kernel_of_16000_samples_convolves_as_scipy_does(groups):
    layer = SmpConv1d(3, 3, 16000, groups=groups, kernel_count=8, initial_radius=0.3, coordinate_std=0.5)
    x = torch.randn(1, 3, 16000)
    kernel = layer.weight.detach().double().numpy()[..., ::-1]
    inputs = x.double().numpy()[0]
    for out in range(3):
        sources = [out] if groups == 3 else range(3)
        expected = sum(fftconvolve(inputs[i], kernel[out, i % kernel.shape[1]])[:16000] for i in sources)
        np.testing.assert_allclose(layer(x)[0, out].detach().numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_a_long_causal_kernel_is_not_convolved_directly():
    layer = SmpConv1d(4, 4, 8192, kernel_count=8)
    x = torch.randn(1, 4, 8192)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    names = {event.name for event in profile.events()}
    assert any("fft" in name for name in names)
    assert "aten::convolution" not in names


# ---- the contract of the package's layers


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_keep_the_output(kind, x):
    layer = make(**kind).eval()
    expected = layer(x)
    loaded = make(**kind).eval()
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["point_weight", "coordinate", "radius", "small_weight"])
def test_kept_kernel_follows_every_parameter(name, x):
    layer = make(small_kernel=3).eval()
    with torch.no_grad():
        before = layer(x)
        getattr(layer, name).mul_(0.5)
        assert (layer(x) - before).abs().max() > 1e-3
        torch.testing.assert_close(layer.weight, layer.construct(), rtol=0, atol=0)


@pytest.mark.parametrize("layer_type", [SmpConv1d, SmpConv2d])
def test_meta_layer_is_materialised_by_reset_parameters(layer_type):
    layer = layer_type(4, 4, 9, groups=4, device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.construct().isfinite().all()
    assert layer.construct().abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_exported_and_traced_layers_equal_eager(kind, x):
    layer = make(**kind)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-5)
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), expected, atol=1e-5, rtol=1e-5)
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in layer.named_parameters()}


def test_construction_compiled_by_inductor_equals_eager():
    layer, compiled = make(), make(compile=True)
    compiled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(compiled.construct(), layer.construct(), atol=1e-5, rtol=1e-5)


def test_channels_last_input_gives_the_same_output(x):
    layer = make()
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x), atol=1e-5, rtol=1e-5)


def test_under_autocast_the_kernel_is_constructed_in_float32(x):
    layer = make()
    expected, expected_output = layer.construct(), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.construct(), expected, rtol=0, atol=0)
        y = layer(x)
    assert (y.float() - expected_output).abs().max() < 0.03 * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_construct_in_float32(dtype):
    layer = make().to(dtype)
    expected = smp_kernel(*(t.float() for t in (layer.point_weight, layer.coordinate, layer.radius)), (7, 7))
    torch.testing.assert_close(layer.construct(), expected.to(dtype), rtol=0, atol=0)


def test_gradcheck_of_a_float64_layer():
    layer = spread(SmpConv2d(2, 2, 3, padding=1, groups=2, kernel_count=3, dtype=torch.float64))
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_layers_can_share_their_points():
    home = nn.Module()
    home.a, home.b = make(), make()
    share_geometry([home.a, home.b], home, "smp_geometry")
    (home.a.weight.sum() + 2 * home.b.weight.sum()).backward()
    assert [name for name in home.state_dict() if "coordinate" in name] == ["smp_geometry.coordinate"]
    clone = copy.deepcopy(home)
    assert clone.a.coordinate is clone.b.coordinate
    assert home.a.coordinate.grad is not None


# ---- in models


def test_the_recipe_gives_each_stage_its_kernel_size():
    with torch.device("meta"):
        model = tcc.patch(timm.create_model("convnext_tiny"), "smp", init="random")
    layers = [m for m in model.modules() if isinstance(m, SmpConv2d)]
    sizes = [layer.kernel_size[0] for layer in layers]
    assert sizes == [31] * 3 + [29] * 3 + [27] * 9 + [13] * 3
    assert all(layer.coordinate.shape == (1, size**2 // 4, 2) for layer, size in zip(layers, sizes, strict=True))
    assert not any(layer.normalize for layer in layers)


def test_a_setting_given_by_the_user_holds_in_all_stages():
    model = tcc.patch(timm.create_model("test_convnext"), "smp", kernel_size=9, small_kernel=5)
    layers = [m for m in model.modules() if isinstance(m, SmpConv2d)]
    assert {(layer.kernel_size, layer.small_kernel) for layer in layers} == {((9, 9), (5, 5))}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kernel_size": 0}, "stage 2: kernel_size=0: expected an int from 1"),
        ({"kernels": 3}, "stage 2: kernels is not a field of this layer"),
        ({"method": "dcls"}, "stage 2: method is the same in all stages"),
    ],
)
def test_wrong_settings_of_a_stage_are_named(settings_, message):
    recipe = {**tcc.load_patch("smp").to_dict(), "by_stage": [{}, settings_]}
    with pytest.raises(ValueError, match="stage 2") as caught:
        tcc.PatchSpec.from_dict(recipe)
    assert message in str(caught.value)


def test_the_last_stage_that_a_recipe_names_holds_for_later_ones():
    recipe = tcc.PatchSpec.from_dict({**tcc.load_patch("smp").to_dict(), "by_stage": [{}, {"kernel_size": 5}]})
    assert [recipe.layer_at(stage).kernel_size for stage in range(4)] == [31, 5, 5, 5]


def test_an_unavailable_init_is_refused():
    with pytest.raises(ValueError, match="init='nearest': expected 'fit'"):
        SmpConv2d.from_conv(nn.Conv2d(8, 8, 5, padding=2, groups=8), SmpSpec(kernel_size=7), init="nearest")


# ---- the paper's function fitting (Fig. 3)


@pytest.mark.usefixtures("one_thread")
def test_moving_points_fit_a_sinusoid_four_times_better_than_fixed_ones():
    target = targets()["sin(3π(x + y))"]
    (moving, _), (fixed, _) = (fit(target, kind, steps=500, seed=0) for kind in (True, False))
    assert moving < 0.1 * target.var()
    assert fixed > 4 * moving
