"""The Gaussian filter and smoothed images, against SciPy and autograd."""

import pytest
import torch
from scipy import ndimage

from timm_contconv.layers.envelope import envelope_filter, smooth
from timm_contconv.layers.envelope.gaussian import envelope_filter_derivative, is_delta

from .oracle import SCIPY_MODES, images, scipy_filter, scipy_smooth


@pytest.mark.parametrize("mode", SCIPY_MODES)
@pytest.mark.parametrize("size", [3, 9])
def test_smoothing_is_scipys_correlation_with_the_softmax_filter(size: int, mode: str) -> None:
    x, sigma = images(), torch.tensor([0.2, 0.6, 0.83, 2.0], dtype=torch.float64)
    torch.testing.assert_close(smooth(x, sigma.square(), size, padding_mode=mode), scipy_smooth(x, sigma, size, mode))


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (4, 1)])
def test_strided_smoothing_computes_every_so_many_th_position(stride: tuple[int, int]) -> None:
    x, variance = images(), torch.rand(4, dtype=torch.float64) + 0.2
    torch.testing.assert_close(smooth(x, variance, 9, stride), smooth(x, variance, 9)[..., :: stride[0], :: stride[1]])


def test_derivative_of_the_filter_is_that_of_autograd() -> None:
    variance = torch.tensor([0.05, 0.3, 0.7, 4.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: envelope_filter(v, 9), variance)
    torch.testing.assert_close(envelope_filter_derivative(variance, 9), torch.einsum("ctc->ct", jacobian))


def test_gradient_of_sigma_is_equation_8() -> None:
    x, sigma = images(), torch.tensor([0.2, 0.6, 0.83, 2.0], dtype=torch.float64, requires_grad=True)
    y = smooth(x, sigma.square(), 5)
    grad_y = images(*y.shape)
    derivative = 2 * sigma.detach().unsqueeze(1) * envelope_filter_derivative(sigma.detach().square(), 5)
    expected = []
    for c, width in enumerate(sigma.tolist()):
        taps, d_taps = scipy_filter(width, 5), derivative[c].numpy()
        along = [ndimage.correlate1d(x[:, c].numpy(), t, 1, mode="constant") for t in (d_taps, taps)]
        change = ndimage.correlate1d(along[0], taps, 2, mode="constant")
        change += ndimage.correlate1d(along[1], d_taps, 2, mode="constant")
        expected.append((change * grad_y[:, c].numpy()).sum())
    (actual,) = torch.autograd.grad(y, sigma, grad_y)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_derivatives_are_right(stride: tuple[int, int]) -> None:
    """In forward mode too, and second ones."""
    x, variance = images(1, 2, 4, 5, requires_grad=True), torch.tensor([0.3, 1.1], dtype=torch.float64).requires_grad_()
    run = lambda x, v: smooth(x, v, 5, stride)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, variance), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, variance), fast_mode=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_smoothing_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    x = images().contiguous(memory_format=memory_format)
    assert smooth(x, torch.ones(4, dtype=torch.float64), 5).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 208.01**-0.5), (torch.float64, 1500.01**-0.5)])
def test_a_delta_has_no_neighbours_and_no_gradient(dtype: torch.dtype, width: float) -> None:
    variance = torch.tensor([width**2], dtype=dtype)
    delta = torch.tensor([[0.0, 0, 1, 0, 0]], dtype=dtype)
    assert is_delta(variance)
    assert torch.equal(envelope_filter(variance, 5), delta)
    assert torch.equal(envelope_filter_derivative(variance, 5), torch.zeros_like(delta))
