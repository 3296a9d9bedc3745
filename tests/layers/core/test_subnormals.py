"""No constructed kernel, and nothing that is merged, holds subnormal numbers, which some processors are slow with."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import every_layer
from timm_contconv.layers import (
    ContinuousConv2d,
    ConvReplacement,
    DclsConv2d,
    FlexConv2d,
    GaussianEnvelopeConv2d,
    InternalNet,
    KernelConv,
    SmpConv2d,
)
from timm_contconv.layers.dcls import DclsSpec
from timm_contconv.layers.envelope.gaussian import envelope_filter
from timm_contconv.layers.flex.formula import gaussian_mask
from timm_contconv.layers.flex.magnet import gabor_filters

#: layers in the sizes that papers use, where far pixels are many
LARGE = {
    "gauss": lambda: DclsConv2d(4, 4, 23, groups=4, kernel_count=26),
    "triangle": lambda: DclsConv2d(4, 4, 23, groups=4, kernel_count=26, interpolation="triangle"),
    "bilinear": lambda: DclsConv2d(4, 4, 17, groups=4, kernel_count=34, interpolation="bilinear"),
    "smp": lambda: SmpConv2d(4, 4, 31, groups=4, points="layer", normalize=False),
    "flex": lambda: FlexConv2d(4, 4, 31, groups=4),
    "ckconv": lambda: FlexConv2d(4, 4, 31, groups=4, mask=False),
    "unmasked": lambda: FlexConv2d(4, 4, 31, groups=4, threshold=0),
    "genv": lambda: GaussianEnvelopeConv2d(4, 4, 3, 2, 1),
    "cc": lambda: ContinuousConv2d(4, 4, 3, 2),
    "cc_wide": lambda: ContinuousConv2d(4, 4, 4, 2, hidden=(16, 16)),
}
every_large_layer = pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())


def subnormals(values: Tensor) -> int:
    size = values.detach().abs()
    return int(((size > 0) & (size < torch.finfo(torch.float32).tiny)).sum())


def kernels(layer: ConvReplacement) -> list[Tensor]:
    """All that an image is multiplied with: in training, outside of it, merged, and merged into one kernel."""
    found = []
    for mode in (True, False):
        layer.train(mode)
        if isinstance(layer, KernelConv):
            found.append(layer.weight)
        elif isinstance(layer, ContinuousConv2d):
            found += [layer.construct(), layer.kernel_at(torch.linspace(1, -1, 7), torch.linspace(1, -1, 7))]
        elif isinstance(layer, GaussianEnvelopeConv2d):
            found.append(envelope_filter(layer.variance, layer.spec.taps(mode)))
    for merged in (layer.to_conv(), layer.to_dense_conv()):
        found += [module.weight for module in merged.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    return found


def count(layer: ConvReplacement) -> int:
    return sum(map(subnormals, kernels(layer)))


@every_layer
def test_of_every_kind_of_layer_at_its_start(make):
    assert count(make()) == 0


@every_large_layer
def test_at_the_start(make):
    assert count(make()) == 0


@every_large_layer
def test_after_a_fit(make):
    layer = make()
    conv = nn.Conv2d(4, 4, 3, layer.stride, 1, groups=layer.groups)
    if layer.method == "cc" and layer.net.hidden:
        conv = nn.Conv2d(4, 4, 4, layer.stride, 1, groups=layer.groups)
    type(layer).fit_([layer], [conv])
    assert count(layer) == 0


@every_large_layer
@pytest.mark.parametrize("scale", [0.0, 0.2, 5.0, 1e9])
def test_with_geometry_tiny_huge_and_far_outside(make, scale):
    layer = make()
    with torch.no_grad():
        for value in layer.geometry.values():
            value.copy_(torch.randn_like(value) * scale)
    layer.constrain_()
    assert count(layer) == 0


@every_large_layer
@pytest.mark.parametrize("size", [1e-42, 1e-36, 1e-12])
def test_with_tiny_weights(make, size):
    """As weight decay leaves them where nothing else happens."""
    layer = make()
    weight = {"genv": "conv.weight", "flex": "kernel.output_weight", "cc": "net.weight"}.get(layer.method)
    weights = layer.get_parameter(weight or "kernel.weight")
    with torch.no_grad():
        weights.copy_(torch.randn_like(weights) * size)
        if layer.method == "flex":
            layer.get_parameter("kernel.output_bias").zero_()
    if layer.method != "genv":  # its convolution is not constructed: the user's own weights stay
        assert count(layer) == 0


@every_large_layer
def test_merged_in_bfloat16(make):
    assert count(make().to(torch.bfloat16)) == 0


def test_basis_functions_hold_none_for_any_width():
    """The masks and envelopes themselves: their products with weights would be slow, too."""
    axis = torch.linspace(-1, 1, 401)
    for sigma in torch.logspace(-4, 1, 40):
        mask = gaussian_mask(torch.zeros(2), sigma.expand(2), [axis, axis], 0.0)
        gabor = gabor_filters(torch.rand(1, 2), torch.rand(1), torch.zeros(1, 2), 1 / sigma.expand(1, 2), [axis, axis])
        taps = envelope_filter(sigma.expand(1) ** 2 + 5e-4, 9)
        assert subnormals(mask) == subnormals(gabor) == subnormals(taps) == 0


@every_large_layer
def test_the_gradient_of_the_image_holds_none(make):
    layer = make()
    x = torch.randn(1, 4, 32, 32, requires_grad=True)
    layer(x).square().mean().backward()
    assert subnormals(x.grad) == 0


def test_a_kernel_of_zeros_learns():
    for make in (LARGE["gauss"], LARGE["smp"], LARGE["cc"]):
        layer = make()
        weight = layer.net.weight if isinstance(layer.geometry_owner, InternalNet) else layer.kernel.weight
        nn.init.zeros_(weight)
        layer(torch.randn(1, 4, 32, 32)).sum().backward()
        assert weight.grad.abs().max() > 0.1


def test_what_is_set_to_zero_is_too_small_to_matter():
    """Compared with the closed form in float64: sums of Gaussians, normalised as in Eq. 11."""
    layer = DclsConv2d(1, 1, 23, kernel_count=1)
    sigma, pixels = 0.27 + 0.23, torch.arange(23.0, dtype=torch.float64) - 11
    with torch.no_grad():
        layer.kernel.weight.fill_(1.0)
        layer.kernel.position.zero_()
        layer.kernel.sigma.fill_(0.23)
    bell = torch.exp(-0.5 * (pixels / sigma) ** 2)
    exact = torch.outer(bell, bell) / (1e-7 + bell.sum() ** 2)
    assert (layer.weight[0, 0].double() - exact).abs().max() < 1e-7
    assert math.isclose(layer.weight.sum().item(), 1, rel_tol=1e-5)


def test_nan_is_seen():
    layer = LARGE["gauss"]()
    with torch.no_grad():
        layer.kernel.weight[0, 0, 0] = torch.nan
    assert layer.weight.isnan().any()
    assert copy.deepcopy(layer).to_conv().weight.isnan().any()


def test_settings_of_a_recipe_that_fits_many_elements():
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    layer = DclsConv2d.from_conv(conv, DclsSpec.of(kernel_size=23, kernel_count=49))
    assert count(layer) == 0
