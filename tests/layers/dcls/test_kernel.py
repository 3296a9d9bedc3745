"""DCLS kernels against the authors' package, float64 autograd and closed forms; fits of them."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import relative, spread_
from tests.memory import peak_allocation
from tests.peers.dcls import Dcls3_1d, peer_kernel, peer_of, to_peer_axes
from timm_contconv.layers import DclsConv1d, DclsConv2d, DclsConv3d
from timm_contconv.layers.core.geometry import share_geometry
from timm_contconv.layers.dcls import DclsSpec, bilinear_kernel, gauss_kernel, repulsion, triangle_kernel

INTERPOLATIONS = ("bilinear", "normalized_bilinear", "triangle", "gauss")
SIZES = {1: (7,), 2: (7, 5), 3: (3, 5, 4)}
LAYERS = {1: DclsConv1d, 2: DclsConv2d, 3: DclsConv3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def random_layer(ndim: int, interpolation: str, size: int | tuple[int, ...], **options) -> nn.Module:
    """A layer whose positions lie all over the kernel and whose widths differ."""
    return spread_(LAYERS[ndim](4, 6, size, groups=2, kernel_count=5, interpolation=interpolation, **options))


# ---- the kernel


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("ndim", "size"), [(1, 7), (1, 8), (2, 9), (2, 6), (2, (7, 4)), (3, 5), (3, 4), (3, (3, 6, 5))]
)
def test_kernel_equals_the_authors_package(ndim, size, interpolation):
    layer = random_layer(ndim, interpolation, size)
    torch.testing.assert_close(layer.kernel(), peer_kernel(peer_of(layer)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients_equal_the_authors_package(ndim, interpolation):
    layer = random_layer(ndim, interpolation, SIZES[ndim])
    if interpolation == "normalized_bilinear":  # on whole pixels, at the kinks, the package has no gradient
        layer.geometry["position"].data.mul_(0.9)
    peer = peer_of(layer)
    kernel = layer.kernel()
    upstream = torch.randn_like(kernel)
    kernel.backward(upstream)
    peer_kernel(peer).backward(upstream)
    torch.testing.assert_close(layer.kernel.weight.grad, peer.weight.grad, atol=1e-5, rtol=1e-4)
    for name, theirs in zip(layer.geometry, (peer.P, peer.SIG), strict=False):
        ours = to_peer_axes(layer, layer.geometry[name].grad, shift=False)
        torch.testing.assert_close(ours, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_output_equals_the_authors_package(interpolation):
    layer = random_layer(2, interpolation, 7, stride=2, padding=3)
    x = torch.randn(2, 4, 11, 13)
    torch.testing.assert_close(layer(x), peer_of(layer)(x), atol=1e-5, rtol=1e-4)


def test_positions_along_one_dimension_equal_dcls3_1d():
    layer = spread_(DclsConv3d(4, 6, (3, 2, 7), groups=2, kernel_count=4, position_dims=(2,)))
    peer = Dcls3_1d(4, 6, 4, dense_kernel_size=(3, 2), dilated_kernel_size=7, groups=2, version="gauss")
    with torch.no_grad():
        peer.weight.copy_(layer.kernel.weight)
        peer.P.copy_(layer.geometry["position"])
        peer.SIG.copy_(layer.geometry["sigma"])
    torch.testing.assert_close(layer.kernel(), peer_kernel(peer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [(0,), (1,)])
def test_flat_kernel_is_the_one_dimensional_kernel(dims):
    size = (1, 7) if dims == (1,) else (7, 1)
    flat = DclsConv2d(4, 4, size, groups=4, kernel_count=3, position_dims=dims)
    line = DclsConv1d(4, 4, 7, groups=4, kernel_count=3)
    with torch.no_grad():
        for ours, theirs in zip(line.kernel.parameters(), flat.kernel.parameters(), strict=True):
            ours.copy_(theirs.view_as(ours))
    torch.testing.assert_close(flat.kernel().flatten(2), line.kernel())


def kernel_inputs(interpolation: str) -> list[torch.Tensor]:
    """Weights and positions, widths where there are some, that are off all kinks; float64."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 1, 3, dtype=torch.float64, generator=generator)
    position = torch.rand(2, 2, 1, 3, dtype=torch.float64, generator=generator) * 3 - 1.4
    sigma = 0.5 + torch.rand(2, 2, 1, 3, dtype=torch.float64, generator=generator)
    return [value.requires_grad_() for value in (weight, position, sigma)][: 2 if interpolation == "bilinear" else 3]


@pytest.mark.parametrize("kernel", [bilinear_kernel, triangle_kernel, gauss_kernel])
def test_first_and_second_derivatives(kernel):
    inputs = kernel_inputs(kernel.__name__.removesuffix("_kernel"))
    assert torch.autograd.gradcheck(lambda *values: kernel(*values, (5, 4)), inputs)
    assert torch.autograd.gradgradcheck(lambda *values: kernel(*values, (5, 4)), inputs)


def gauss_by_the_formula(weight, position, sigma, kernel_size):
    """Eq. 10 and 11, pixel by pixel of the whole kernel, with PyTorch's own derivatives."""
    pixels = torch.stack(torch.meshgrid(*(torch.arange(k) - k // 2 for k in kernel_size), indexing="ij"))
    distance = pixels[:, None, None, None] - position[..., None, None]  # (D, C_out, C_in/groups, m, K, K)
    bells = torch.exp(-((distance / (0.27 + sigma.abs())[..., None, None]) ** 2 / 2).sum(0))
    return (weight[..., None, None] * bells / (1e-7 + bells.sum((-1, -2), keepdim=True))).sum(2)


def test_gauss_gradients_equal_those_of_the_formula():
    """The Gauss kernel has a backward of its own; autograd, functional transforms and forward mode agree on it."""
    inputs = kernel_inputs("gauss")
    functions = (gauss_kernel, gauss_by_the_formula)
    ours, theirs = (lambda *values, f=f: f(*values, (5, 4)).square().sum() for f in functions)
    expected = torch.autograd.grad(theirs(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(ours(*inputs), inputs), expected)
    torch.testing.assert_close(torch.func.grad(ours, (0, 1, 2))(*inputs), expected)
    tangents = tuple(map(torch.randn_like, inputs))
    results = [torch.func.jvp(f, tuple(inputs), tangents) for f in (ours, theirs)]
    torch.testing.assert_close(*results)
    several = [torch.stack([value, 2 * value]).detach() for value in inputs]
    results = [torch.vmap(torch.func.grad(f, (0, 1, 2)))(*several) for f in (ours, theirs)]
    torch.testing.assert_close(*results)


@given(size=st.integers(1, 12), position=st.floats(-5, 5))
@settings(deadline=None, max_examples=50)
def test_bilinear_splits_an_element_between_two_pixels(size, position):
    position = float(min(max(position, -(size // 2)), size - 1 - size // 2))
    kernel = bilinear_kernel(torch.ones(1, 1, 1), torch.full((1, 1, 1, 1), position), (size,))
    pixels = torch.arange(size) - size // 2
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    assert (kernel * pixels).sum().item() == pytest.approx(position, abs=1e-4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS[1:])
def test_elements_are_normalised_over_the_kernel(interpolation):
    layer = random_layer(2, interpolation, 15)
    with torch.no_grad():
        layer.geometry["position"].clamp_(-3, 3)
        for width in list(layer.geometry.values())[1:]:
            width.clamp_(-1, 1)
    torch.testing.assert_close(layer.kernel().sum((2, 3)), layer.kernel.weight.sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_geometry_that_is_not_finite_is_refused(interpolation):
    layer = DclsConv2d(2, 2, 7, groups=2, kernel_count=3, interpolation=interpolation)
    for name, value in layer.geometry.items():
        kept = value.detach().clone()
        value.data[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"{name}: 1 of 12 values are NaN or infinite, expected finite numbers"):
            layer(torch.zeros(1, 2, 9, 9))
        value.data = kept
    assert layer(torch.zeros(1, 2, 9, 9)).isfinite().all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_position_that_is_nan_gives_a_kernel_that_is_nan_where_nothing_is_checked(interpolation):
    """As on an accelerator, where a check would wait for the device."""
    layer = DclsConv2d(2, 2, 7, groups=2, kernel_count=3, interpolation=interpolation)
    layer.geometry["position"].data[0, 0, 0, 0] = torch.nan
    assert layer.kernel.function()(**layer.kernel.sources())[0].isnan().any()


def test_construction_takes_a_tenth_of_the_packages_memory():
    layer = DclsConv2d(768, 768, 23, groups=768, kernel_count=26)
    peer = peer_of(layer)
    theirs = peak_allocation(lambda: peer_kernel(peer).sum().backward())
    ours = peak_allocation(lambda: layer.kernel().sum().backward())
    assert 768 * 23 * 23 * 4 <= ours < theirs / 10, f"{ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB"


# ---- initial values, constraint, penalty, arguments


def test_initial_values_are_those_of_the_paper():
    layer = DclsConv2d(512, 512, 23, groups=512, kernel_count=26)
    assert layer.geometry["position"].std().item() == pytest.approx(0.5, abs=0.01)
    assert (layer.geometry["sigma"] == 0.23).all()
    bound = 1 / 26**0.5  # nn.Conv2d: uniform with variance 1 / (3 fan_in)
    assert layer.kernel.weight.abs().max().item() == pytest.approx(bound, abs=0.01)
    assert layer.bias.abs().max().item() == pytest.approx(bound, abs=0.01)
    triangle = DclsConv2d(4, 4, 23, groups=4, kernel_count=26, interpolation="triangle")
    assert not triangle.geometry["sigma"].any()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_only_positions_without_widths_are_clamped(interpolation):
    layer = random_layer(2, interpolation, (5, 4))
    layer.geometry["position"].data.fill_(9)
    layer.constrain_()
    expected = ({2}, {1}) if "bilinear" in interpolation else ({9}, {9})
    assert tuple({*axis.flatten().tolist()} for axis in layer.geometry["position"]) == expected


def test_repulsion_is_the_mean_over_pairs():
    position = torch.tensor([[[[0.0, 0.5, 3.0]]], [[[0.0, 0.0, 0.0]]]])  # (2, 1, 1, 3)
    assert repulsion(position).item() == pytest.approx(0.5 / 3)
    assert repulsion(torch.zeros(2, 4, 1, 1)).item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_count": 0}, "kernel_count=0: expected at least 1"),
        ({"kernel_count": 2.5}, "kernel_count=2.5: expected an int"),
        ({"kernel_count": True}, "kernel_count=True: expected an int"),
        ({"kernel_count": None}, "kernel_count=None: expected a positive int; tcc.patch computes it"),
        ({"position_dims": 1}, "position_dims=1: expected a list"),
        ({"position_dims": (2,)}, "position_dims=(2,): expected ascending spatial dimensions out of 0..1"),
        ({"position_dims": (1, 0)}, "position_dims=(1, 0): expected ascending spatial dimensions out of 0..1"),
        ({"position_dims": ()}, "position_dims=(): expected ascending spatial dimensions out of 0..1"),
        (
            {"interpolation": "cubic"},
            "interpolation='cubic': expected 'bilinear', 'normalized_bilinear', '",
        ),
        ({"sigma": 1}, "sigma is not a field of this layer"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        DclsConv2d(4, 4, 5, **{"kernel_count": 3, **arguments})


# ---- fits


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bilinear_fit_with_an_element_per_pixel_is_exact(ndim, groups):
    conv = CONVS[ndim](4, 4, 3, padding=1, groups=groups)
    spec = DclsSpec(interpolation="bilinear", kernel_size=5, kernel_count=3**ndim + 2)
    layer = LAYERS[ndim].from_conv(conv, spec)
    x = torch.randn(2, 4, *(9,) * ndim)
    assert relative(layer(x), conv(x)) < 1e-5
    assert layer.fit_error(conv) < 1e-5


def smooth_convs(channels: int, count: int) -> list[nn.Conv2d]:
    """Depthwise convolutions with kernels that fall off towards their rim, as trained ones do."""
    axis = torch.linspace(-1, 1, 7)
    window = torch.exp(-1.5 * (axis[:, None] ** 2 + axis**2))
    convs = [nn.Conv2d(channels, channels, 7, padding=3, groups=channels) for _ in range(count)]
    for conv in convs:
        conv.weight.data.mul_(window)
    return convs


def smooth_images(channels: int) -> torch.Tensor:
    """Images whose pixels have a correlation of 0.8^distance along each axis."""
    pixels = torch.arange(40)
    root = torch.linalg.cholesky(0.8 ** (pixels[:, None] - pixels).abs().float())
    return root @ torch.randn(8, channels, 40, 40) @ root.mT


@pytest.mark.parametrize(("interpolation", "limit"), [("bilinear", 0.1), ("triangle", 0.06), ("gauss", 0.06)])
def test_half_as_many_elements_as_pixels_give_nearly_the_same_outputs(interpolation, limit):
    """Three layers that share positions. The search must beat elements that stay on the 26 pixels that matter most."""
    convs = smooth_convs(16, 3)
    spec = DclsSpec(interpolation=interpolation, kernel_size=13, kernel_count=26)
    layers = [spec.build(conv) for conv in convs]
    share_geometry([layer.kernel for layer in layers])
    DclsConv2d.fit_(layers, convs)
    x = smooth_images(16)
    kernels = torch.stack([conv.weight.detach()[:, 0].flatten(1) for conv in convs], 1)
    others = kernels.square().sum(1).argsort(1, descending=True)[:, 26:]
    for layer, conv in zip(layers, convs, strict=True):
        wanted = conv(x) - conv.bias.view(-1, 1, 1)
        error = (layer(x) - conv(x)).norm() / wanted.norm()
        lost = torch.zeros(16, 49).scatter(1, others, conv.weight.detach()[:, 0].flatten(1).gather(1, others))
        missed = nn.functional.conv2d(x, lost.view_as(conv.weight), padding=3, groups=16)
        assert error < limit
        assert error < 0.5 * missed.norm() / wanted.norm()


def test_a_kernel_larger_than_the_new_one_loses_its_rim():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    layer = DclsConv2d.from_conv(conv, DclsSpec(interpolation="bilinear", kernel_size=5, kernel_count=25))
    kept = conv.weight[..., 1:-1, 1:-1]
    torch.testing.assert_close(layer.weight, kept)
    lost = (1 - (kept.norm() / conv.weight.norm()) ** 2).sqrt()
    assert layer.fit_error(conv) == pytest.approx(lost.item(), rel=1e-4)


@pytest.mark.parametrize("sigma", [0.0, 0.23, 5.0])
def test_gauss_kernels_hold_no_subnormal_numbers(sigma):
    layer = DclsConv2d(64, 64, 23, groups=64, kernel_count=26)
    nn.init.constant_(layer.geometry["sigma"], sigma)
    size = layer.weight.abs()
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()
