"""FlexConvs that start as the convolutions that they replace."""

import pytest
import torch
from torch import nn

from timm_contconv.layers.flex import FlexConv1d, FlexConv2d, FlexSpec


@pytest.mark.parametrize(("size", "hidden"), [(1, 32), (3, 32), (5, 32), (7, 64)])
@pytest.mark.parametrize("groups", [1, 8])
def test_small_kernels_are_reproduced(size, hidden, groups):
    conv = nn.Conv2d(8, 8, size, padding=size // 2, groups=groups)
    layer = FlexConv2d.from_conv(conv, FlexSpec(kernel_size=21, hidden_channels=hidden))
    x = torch.randn(2, 8, 16, 16)
    assert layer.fit_error(conv) < 2e-4
    assert layer.receptive_field() == conv.kernel_size
    assert (layer(x) - conv(x)).norm() < 1e-3 * conv(x).norm()


def test_larger_kernels_are_reproduced_as_well_as_their_dimensions_allow():
    conv = nn.Conv2d(200, 200, 7, padding=3, groups=200)
    layer = FlexConv2d.from_conv(conv, FlexSpec(kernel_size=31))
    singular = torch.linalg.svdvals(conv.weight.detach().double().flatten(1))
    best = (singular[33:].square().sum() / singular.square().sum()).sqrt().item()
    assert best <= layer.fit_error(conv) < 1.05 * best


def test_fit_is_deterministic_and_leaves_the_random_numbers_alone():
    conv = nn.Conv2d(6, 6, 5, padding=2, groups=6)
    layers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layers.append(FlexConv2d.in_place_of(conv, FlexSpec(kernel_size=15)))
        state = torch.random.get_rng_state()
        FlexConv2d.fit_([layers[-1]], [conv])
        assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(layers[0].weight, layers[1].weight, atol=1e-6, rtol=1e-4)


def test_a_sequence_convolution_is_reproduced():
    conv = nn.Conv1d(6, 4, 9, padding=4, groups=2)
    layer = FlexConv1d.from_conv(conv, FlexSpec(kernel_size=31))
    assert (layer.kernel_size, layer.padding, layer.groups) == ((31,), (15,), 2)
    x = torch.randn(2, 6, 40)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-3, rtol=1e-3)
