"""MAGNets are products of Gabor filters, of known frequency."""

import math

import numpy as np
import pytest
import torch

from timm_contconv.layers.flex import FlexConv2d, MAGNet
from timm_contconv.layers.flex.magnet import filter_frequencies, gabor_filters


def test_gabor_filters_on_a_grid_equal_those_at_its_points():
    weight, mean, gamma = torch.randn(3, 5, 2, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    axes = [torch.linspace(-1, 1, 6, dtype=torch.float64), torch.linspace(-1, 1, 7, dtype=torch.float64)]
    grid = torch.cartesian_prod(*axes)
    envelope = torch.exp(-0.5 * (gamma * (grid[:, None] - mean)).square().sum(-1))
    expected = (envelope * torch.sin(grid @ weight.T + bias)).T.reshape(5, 6, 7)
    torch.testing.assert_close(gabor_filters(weight, bias, mean, gamma, axes), expected)


def test_magnet_is_the_kernel_without_mask():
    layer = FlexConv2d(3, 4, 9, mask=False)
    magnet = MAGNet(np.int64(2), np.int64(12), hidden_channels=np.int64(32))
    magnet.load_state_dict({n: v.reshape(magnet.get_parameter(n).shape) for n, v in layer.kernel.state_dict().items()})
    axis = torch.linspace(-1, 1, 9)
    torch.testing.assert_close(magnet(axis, axis).view(4, 3, 9, 9), layer.weight, atol=1e-5, rtol=1e-5)


def test_a_filter_has_the_frequency_of_its_sine_and_two_deviations_of_its_envelope():
    magnet = MAGNet(2, 1, hidden_channels=2, hidden_layers=1)
    with torch.no_grad():
        magnet.sine_weight.copy_(2 * math.pi * torch.tensor([[[1.0, -3], [2, 0]], [[0, 0.5], [0, 0]]]))
        magnet.gamma.copy_(math.pi * torch.tensor([[[1.0, 1], [4, 3]], [[2, 5], [1, 1]]]))
    # Eq. 21: max(3 + 1, 2 + 3) + max(0.5 + 2, 0 + 1)
    assert magnet.max_frequency() == pytest.approx(5 + 2.5, rel=1e-6)


def test_an_elongated_filter_exceeds_the_papers_estimate():
    weight, gamma, axis = torch.zeros(1, 2), torch.tensor([[15.0, 0.0]]), torch.linspace(-1, 1, 257)
    assert filter_frequencies(weight[None], gamma[None]).item() == 0
    profile = gabor_filters(weight, torch.tensor([math.pi / 2]), weight, gamma, [axis, axis[:1]]).flatten()
    energy, cycles = torch.fft.rfft(profile, n=4096).abs().square(), torch.fft.rfftfreq(4096, 2 / 256)
    share = 1 - math.erf(2 * math.pi / 15)  # of a Gaussian's energy beyond 1 cycle per unit
    assert energy[cycles > 1].sum() / energy.sum() == pytest.approx(share, abs=0.02)
    assert share > 0.5


def test_what_magnets_do_not_have_is_refused():
    with pytest.raises(ValueError, match="ndim=3: expected 1 or 2"):
        MAGNet(3, 4)
    with pytest.raises(ValueError, match="out_channels=0: expected a positive int"):
        MAGNet(2, 0)
    with pytest.raises(ValueError, match="hidden_layers=True: expected a positive int"):
        MAGNet(2, 1, hidden_layers=True)
    with pytest.raises(ValueError, match="input_scale='a': expected a positive number"):
        MAGNet(2, 1, input_scale="a")
    with pytest.raises(ValueError, match="1 coordinates: expected 2 tensors"):
        MAGNet(2, 4)(torch.zeros(3))
