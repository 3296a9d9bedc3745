"""DCLS layers against the authors' package, float64 autograd and closed forms."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from timm_contconv.layers import DclsConv1d, DclsConv2d, DclsConv3d
from timm_contconv.layers.dcls import bilinear_kernel, gauss_kernel, repulsion, triangle_kernel
from timm_contconv.train import constrain_

from .memory import peak_allocation
from .peers.dcls import Dcls3_1d, peer_kernel, peer_of, to_peer_axes

INTERPOLATIONS = ("bilinear", "triangle", "gauss")
SIZES = {1: (7,), 2: (7, 5), 3: (3, 5, 4)}
LAYERS = {1: DclsConv1d, 2: DclsConv2d, 3: DclsConv3d}


def random_layer(ndim: int, interpolation: str, size: int | tuple[int, ...], **options) -> nn.Module:
    """A layer whose positions lie all over the kernel and whose widths differ."""
    layer = LAYERS[ndim](4, 6, size, groups=2, kernel_count=5, interpolation=interpolation, **options)
    with torch.no_grad():
        layer.position.normal_(0, max(layer.kernel_size) / 5)
        if layer.sigma is not None:
            layer.sigma.normal_(0, 1)
        constrain_(layer)
    return layer


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("ndim", "size"), [(1, 7), (1, 8), (2, 9), (2, 6), (2, (7, 4)), (3, 5), (3, 4), (3, (3, 6, 5))]
)
def test_kernel_equals_the_authors_package(ndim, size, interpolation):
    layer = random_layer(ndim, interpolation, size)
    torch.testing.assert_close(layer.construct(), peer_kernel(peer_of(layer)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients_equal_the_authors_package(ndim, interpolation):
    layer = random_layer(ndim, interpolation, SIZES[ndim])
    peer = peer_of(layer)
    kernel = layer.construct()
    upstream = torch.randn_like(kernel)
    kernel.backward(upstream)
    peer_kernel(peer).backward(upstream)
    torch.testing.assert_close(layer.element_weight.grad, peer.weight.grad, atol=1e-5, rtol=1e-4)
    ours = to_peer_axes(layer, layer.position.grad, shift=False)
    torch.testing.assert_close(ours, peer.P.grad, atol=1e-5, rtol=1e-4)
    if layer.sigma is not None:
        ours = to_peer_axes(layer, layer.sigma.grad, shift=False)
        torch.testing.assert_close(ours, peer.SIG.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_output_equals_the_authors_package(interpolation):
    layer = random_layer(2, interpolation, 7, stride=2, padding=3)
    x = torch.randn(2, 4, 11, 13)
    torch.testing.assert_close(layer(x), peer_of(layer)(x), atol=1e-5, rtol=1e-4)


def test_positions_along_one_dimension_equal_dcls3_1d():
    layer = DclsConv3d(4, 6, (3, 2, 7), groups=2, kernel_count=4, interpolation="gauss", position_dims=(2,))
    peer = Dcls3_1d(4, 6, 4, dense_kernel_size=(3, 2), dilated_kernel_size=7, groups=2, version="gauss")
    with torch.no_grad():
        peer.weight.copy_(layer.element_weight)
        peer.P.copy_(layer.position.normal_(0, 1.5))
        peer.SIG.copy_(layer.sigma.normal_())
    torch.testing.assert_close(layer.construct(), peer_kernel(peer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [(0,), (1,)])
def test_flat_kernel_is_the_one_dimensional_kernel(dims):
    size = (1, 7) if dims == (1,) else (7, 1)
    flat = DclsConv2d(4, 4, size, groups=4, kernel_count=3, position_dims=dims)
    line = DclsConv1d(4, 4, 7, groups=4, kernel_count=3)
    with torch.no_grad():
        line.element_weight.copy_(flat.element_weight.reshape(4, 1, 3))
        line.position.copy_(flat.position.reshape(1, 4, 1, 3))
        line.sigma.copy_(flat.sigma.reshape(1, 4, 1, 3))
    torch.testing.assert_close(flat.construct().flatten(2), line.construct())


@pytest.mark.parametrize("kernel", [triangle_kernel, gauss_kernel])
def test_gradcheck_of_kernels_with_widths(kernel):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 1, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    position = torch.randn(2, 2, 1, 3, dtype=torch.float64, generator=generator).requires_grad_()
    sigma = (0.5 + torch.rand(2, 2, 1, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, p, s: kernel(w, p, s, (5, 4)), (weight, position, sigma))


def test_gradcheck_of_bilinear_kernel():
    weight = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    position = (torch.rand(2, 2, 1, 3, dtype=torch.float64) * 3 - 1.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, p: bilinear_kernel(w, p, (5, 4)), (weight, position))


@given(size=st.integers(1, 12), position=st.floats(-5, 5))
@settings(deadline=None, max_examples=50)
def test_bilinear_splits_an_element_between_two_pixels(size, position):
    position = float(min(max(position, -(size // 2)), size - 1 - size // 2))
    kernel = bilinear_kernel(torch.ones(1, 1, 1), torch.full((1, 1, 1, 1), position), (size,))
    pixels = torch.arange(size) - size // 2
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    assert (kernel * pixels).sum().item() == pytest.approx(position, abs=1e-4)


@pytest.mark.parametrize("interpolation", ["triangle", "gauss"])
def test_elements_are_normalised_over_the_kernel(interpolation):
    layer = random_layer(2, interpolation, 15)
    with torch.no_grad():
        layer.position.clamp_(-3, 3)
        layer.sigma.clamp_(-1, 1)
    total = layer.element_weight.sum(-1)
    torch.testing.assert_close(layer.construct().sum((2, 3)), total, atol=1e-4, rtol=1e-4)


def test_initial_values_are_those_of_the_paper():
    layer = DclsConv2d(512, 512, 23, groups=512, kernel_count=26)
    assert layer.position.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(layer.sigma, torch.full_like(layer.sigma, 0.23))
    bound = 1 / 26**0.5  # nn.Conv2d: uniform with variance 1 / (3 fan_in)
    assert layer.element_weight.abs().max().item() == pytest.approx(bound, abs=0.01)
    triangle = DclsConv2d(4, 4, 23, groups=4, kernel_count=26, interpolation="triangle")
    assert not triangle.sigma.any()


def test_only_bilinear_positions_are_clamped():
    for interpolation in INTERPOLATIONS:
        layer = random_layer(2, interpolation, (5, 4))
        with torch.no_grad():
            layer.position.fill_(9)
        constrain_(layer)
        expected = ([2] * 30, [1] * 30) if interpolation == "bilinear" else ([9] * 30, [9] * 30)
        assert (layer.position[0].flatten().tolist()[:30], layer.position[1].flatten().tolist()[:30]) == expected


def test_repulsion_is_the_mean_over_pairs():
    position = torch.tensor([[[[0.0, 0.5, 3.0]]], [[[0.0, 0.0, 0.0]]]])  # (2, 1, 1, 3)
    assert repulsion(position).item() == pytest.approx(0.5 / 3)


def test_repulsion_of_one_element_is_zero():
    assert repulsion(torch.zeros(2, 4, 1, 1)).item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_count": 0}, "kernel_count=0: expected a positive int"),
        ({"kernel_count": 2.5}, "kernel_count=2.5: expected a positive int"),
        ({"kernel_count": True}, "kernel_count=True: expected a positive int"),
        ({"kernel_count": 3, "position_dims": 1}, "position_dims=1: expected ascending spatial dimensions"),
        ({"kernel_count": 3, "kernel_size": 0}, "kernel_size=0: expected a positive int"),
        ({"kernel_count": 3, "kernel_size": (3, 3, 3)}, "or 2 of them"),
        ({"kernel_count": 3, "interpolation": "cubic"}, "interpolation='cubic': expected one of bilinear"),
        ({"kernel_count": 3, "position_dims": (2,)}, "expected ascending spatial dimensions out of 0..1"),
        ({"kernel_count": 3, "dilation": 2}, "dilation=2: expected 1"),
        ({"kernel_count": 3, "groups": 3}, "expected a multiple of groups=3"),
        ({"kernel_count": 3, "padding": "full"}, "padding='full': expected"),
        ({"kernel_count": 3, "padding_mode": "mirror"}, "padding_mode='mirror': expected one of zeros"),
        ({"kernel_count": 3, "compile": "yes"}, "compile='yes': expected 'auto'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DclsConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 5, **arguments})


def test_construction_takes_a_tenth_of_the_packages_memory():
    layer = DclsConv2d(768, 768, 23, groups=768, kernel_count=26)
    peer = peer_of(layer)
    theirs = peak_allocation(lambda: peer_kernel(peer).sum().backward())
    ours = peak_allocation(lambda: layer.construct().sum().backward())
    assert 768 * 23 * 23 * 4 <= ours < theirs / 10, f"{ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB"


def test_layer_convolves_with_its_kernel_in_every_padding_mode():
    x = torch.randn(2, 4, 9, 10)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        layer = random_layer(2, "gauss", (5, 4), padding=(2, 1), padding_mode=mode)
        padded = F.pad(x, (1, 1, 2, 2), mode="constant" if mode == "zeros" else mode)
        expected = F.conv2d(padded, layer.construct(), layer.bias, groups=2)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "triangle", "gauss"])
def test_a_position_that_is_not_a_number_shows(interpolation):
    layer = DclsConv2d(2, 2, 7, groups=2, kernel_count=3, interpolation=interpolation)
    layer.position.data[0, 0, 0, 0] = torch.nan
    assert layer.weight[0].isnan().any()
