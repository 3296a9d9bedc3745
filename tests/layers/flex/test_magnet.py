"""MAGNets are products of Gabor filters, of known frequency."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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


def gaussian_derivatives_error(target: torch.Tensor, axis: torch.Tensor) -> float:
    """Mean squared error of the best sum of all derivatives of a Gaussian up to order 9, of the best width."""
    errors = []
    for sigma in np.geomspace(0.05, 1, 40):
        t = axis.numpy() / sigma
        rows = [np.polynomial.hermite_e.HermiteE.basis(k)(t) * np.exp(-0.5 * t**2) for k in range(10)]
        basis = np.stack([np.outer(rows[i], rows[j]).ravel() for i in range(10) for j in range(10 - i)], 1)
        inside = torch.linalg.qr(torch.from_numpy(basis / np.linalg.norm(basis, axis=0))).Q
        errors.append((target.flatten() - inside @ (inside.T @ target.flatten())).square().mean().item())
    return min(errors)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("frequency", [2, 6])
def test_a_magnet_fits_a_gabor_function_better_than_gaussian_derivatives_of_its_size(frequency):
    """The paper's Fig. 4: 58 parameters against 55 weights and a width."""
    axis = torch.linspace(-1, 1, 33, dtype=torch.float64)
    envelope = torch.exp(-0.5 * (axis / 0.4).square())
    target = torch.outer(envelope, envelope) * torch.sin(2 * math.pi * frequency * (axis[:, None] + axis))
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        magnet = MAGNet(2, 1, hidden_channels=3, hidden_layers=1, dtype=torch.float64)
        optimizer = torch.optim.Adam(magnet.parameters(), lr=0.01)
        for _ in range(300):
            loss = F.mse_loss(magnet(axis, axis)[0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
    assert sum(p.numel() for p in magnet.parameters()) == 58
    assert min(errors) < 0.5 * gaussian_derivatives_error(target, axis)


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
