"""The internal net: how it starts, its parameters, and what is refused."""

import pytest
import torch
from torch import nn

from timm_contconv.layers.cc import ContinuousConv2d
from timm_contconv.layers.cc.interpolation import interpolating_net
from timm_contconv.layers.cc.net import internal_features

from .builders import build, images


def test_it_starts_as_linear_interpolation_of_a_kernel() -> None:
    layer = ContinuousConv2d(2, 3, (3, 4), scale=0.7, dtype=torch.float64)
    pixels = layer.net.weight[..., :-1].unflatten(2, (3, 4)).detach()
    centres = [torch.arange(size).flip(0).double() - (size - 1) / 2 for size in (3, 4)]
    torch.testing.assert_close(layer.kernel_at(*centres), pixels)
    halfway = layer.kernel_at(centres[0], centres[1][:-1] - 0.5)
    torch.testing.assert_close(halfway, (pixels[..., 1:] + pixels[..., :-1]) / 2)


def test_interpolating_features_add_up_to_one_between_pixels() -> None:
    net = interpolating_net([[(1, 1.5), (0, 0.5), (-1, -0.5)], [(1.5, 1.5), (0.5, 0.5), (-0.5, -0.5), (-1.5, -1.5)]])
    rows, columns = 1.5 - 2.5 * torch.rand(50).double(), 1.5 - 3 * torch.rand(50).double()
    features = internal_features(rows, columns, **net)
    assert features.min() >= 0
    torch.testing.assert_close(features[..., :-1].sum(-1), torch.ones(50, 50, dtype=torch.float64))


@pytest.mark.parametrize(("hidden", "scale"), [(None, 0.5), (None, 1), ((16,), 0.5), ((16,), 0.7), ((32, 32), 0.7)])
def test_kernels_start_with_the_variance_of_plain_ones(hidden, scale: float) -> None:
    layer = ContinuousConv2d(64, 64, 3, scale=scale, hidden=hidden)
    kernel = layer.construct() if hidden is None else layer.kernel_at(*(3 * torch.rand(40) - 1.5 for _ in range(2)))
    variance = float(kernel.detach().square().mean())
    assert variance == pytest.approx(float(nn.Conv2d(64, 64, 3).weight.detach().square().mean()), rel=0.15)


def test_parameters_are_the_layers_of_the_net_and_the_hidden_ones_are_geometry() -> None:
    layer = ContinuousConv2d(4, 6, 3, hidden=(16, 8), groups=2)
    hidden = {"weight_1": (16, 2), "bias_1": (16,), "weight_2": (8, 16), "bias_2": (8,)}
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "net.weight": (6, 2, 9), "bias": (6,), **{f"net.{name}": shape for name, shape in hidden.items()},
    }  # fmt: skip
    assert list(layer.geometry) == list(hidden)
    assert not hasattr(layer, "weight")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [0.5, 0.61])
@pytest.mark.parametrize(("name", "value"), [("weight", float("nan")), ("bias_2", float("-inf"))])
def test_parameters_that_are_not_finite_are_named(name: str, value: float, scale: float, training: bool) -> None:
    layer = build(scale).train(training)
    with torch.no_grad():
        layer.net.get_parameter(name).flatten()[1] = value
        with pytest.raises(ValueError, match=f"^{name}: 1 of .* values are NaN or infinite"):
            layer(images())


def test_large_finite_parameters_are_taken_though_their_sum_overflows() -> None:
    layer = build(0.5, dtype=torch.float32)
    layer.net.weight.data.fill_(3e38)
    assert layer(torch.zeros(1, 4, 6, 6)).shape == (1, 6, 3, 3)
