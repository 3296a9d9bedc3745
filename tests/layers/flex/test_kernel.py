"""FlexConv kernels are those of the paper's equations and of the release; their frequencies are known."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.peers.flexnet import ReleasedFlexConv
from timm_contconv.layers.flex import FlexConv1d, FlexConv2d, FlexSpec

from .oracle import direct_kernel, make, set_mask_


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    channels=st.sampled_from([(1, 1, 1), (4, 4, 4), (4, 6, 2), (3, 2, 1)]),
    hidden=st.sampled_from([(1, 1), (4, 3), (7, 2)]),
    mask=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_construction_equals_a_direct_evaluation_of_the_equations(sizes, channels, hidden, mask, seed):
    torch.manual_seed(seed)
    (c_in, c_out, groups), (hidden_channels, hidden_layers) = channels, hidden
    layer = (FlexConv1d, FlexConv2d)[len(sizes) - 1](
        c_in, c_out, sizes, groups=groups, mask=mask, dtype=torch.float64,
        hidden_channels=hidden_channels, hidden_layers=hidden_layers,
    )  # fmt: skip
    if mask:
        with torch.no_grad():
            layer.kernel.mask_mean.uniform_(-0.6, 0.6)
            layer.kernel.mask_sigma.uniform_(-0.8, 0.8)
    expected = direct_kernel(layer)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    layer.kernel.look()  # from now on only what the mask leaves is constructed
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_without_a_threshold_the_kernel_is_magnet_times_mask():
    layer = make(threshold=0.0, dtype=torch.float64)
    np.testing.assert_allclose(layer.weight.detach().numpy(), direct_kernel(layer, crop=False), rtol=1e-9, atol=1e-12)


def test_the_layer_equals_the_released_one():
    peer = ReleasedFlexConv(3, 4, size=21, sigma=0.3).double()
    layer = FlexConv2d(3, 4, 21, initial_sigma=0.3, dtype=torch.float64)
    filters, state = peer.Kernel.filters, peer.Kernel.output_linear
    values = {
        "sine_weight": torch.stack([f.linear.weight for f in filters])[..., 0, 0],
        "sine_bias": torch.stack([f.linear.bias for f in filters]),
        "mean": torch.stack([f.mu for f in filters]),
        "gamma": torch.stack([f.gamma for f in filters]),
        "hidden_weight": torch.stack([m.weight for m in peer.Kernel.linear])[..., 0, 0],
        "hidden_bias": torch.stack([m.bias for m in peer.Kernel.linear]),
        "output_weight": state.weight.view(4, 3, -1),
        "output_bias": state.bias.view(4, 3),
        "mask_mean": peer.mask_params[:, 0],
        "mask_sigma": peer.mask_params[:, 1],
    }
    layer.kernel.load_state_dict(values)
    peer.axis = lambda d: torch.linspace(-1, 1, 21, dtype=torch.float64)[4:17]  # the release's crop, in float64
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x), atol=1e-9, rtol=1e-9)


def test_kernel_gradients():
    kernel = make(kernel_size=(5, 4), groups=4, hidden_channels=3, dtype=torch.float64, initial_sigma=0.5).kernel

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(kernel, dict(zip(dict(kernel.named_parameters()), values, strict=True)), ())

    assert torch.autograd.gradcheck(run, tuple(kernel.parameters()))


def test_initial_values_are_those_of_the_paper_and_the_release():
    kernel = FlexConv2d(64, 64, 33, hidden_channels=400).kernel
    assert kernel.mask_mean.tolist() == [0, 0]
    assert kernel.mask_sigma.tolist() == [0.125, 0.125]
    for number in range(1, 5):  # Gamma(6 / l, 1): mean and variance 6 / l
        gamma = kernel.gamma[number - 1].detach()
        assert gamma.mean().item() == pytest.approx(6 / number, rel=0.1)
        assert gamma.var().item() == pytest.approx(6 / number, rel=0.2)
    speed = (kernel.sine_weight / kernel.gamma).detach()  # uniform, 25.6 / sqrt(4) / sqrt(2) at most
    assert speed.abs().max().item() == pytest.approx(25.6 / 2 / math.sqrt(2), rel=0.01)
    assert speed.std().item() == pytest.approx(25.6 / 2 / math.sqrt(2) / math.sqrt(3), rel=0.05)
    assert kernel.mean.abs().max().item() == pytest.approx(1, abs=0.01)
    assert kernel.sine_bias.abs().max().item() == pytest.approx(math.pi, rel=0.01)


def test_causal_masks_start_at_the_newest_sample():
    layer = FlexConv1d(2, 3, 64)
    assert layer.kernel.mask_mean.tolist() == [1]
    assert layer.weight.detach()[..., -1].abs().min() > 0
    assert (layer.weight[..., :32] == 0).all()


@pytest.mark.parametrize("layer_type", [FlexConv1d, FlexConv2d])
def test_kernels_of_few_pixels_start_with_some(layer_type):
    for size in range(1, 7):
        weight = layer_type(2, 3, size).weight.detach()
        assert weight.flatten(2).any(-1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_channels": 0}, "hidden_channels=0: expected at least 1"),
        ({"hidden_layers": True}, "hidden_layers=True: expected an int"),
        ({"input_scale": 0}, "input_scale=0: expected more than 0"),
        ({"mask": "no"}, "mask='no': expected True or False"),
        ({"penalize_mask": 1}, "penalize_mask=1: expected True or False"),
        ({"initial_sigma": math.nan}, "initial_sigma=nan: expected at most 100"),
        ({"threshold": 1}, "threshold=1: expected less than 1"),
        ({"threshold": None}, "threshold=None: expected a number"),
        ({"crop_every": 2}, "crop_every is not a field of this layer"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**options)


def test_settings_reach_the_kernel_and_ints_of_numpy_are_taken():
    values = {"hidden_channels": np.int64(5), "hidden_layers": np.int64(2), "input_scale": 3.0, "initial_sigma": 0.3}
    kernel = FlexConv2d(4, 4, np.int64(9), **values, threshold=0.2, penalize_mask=True).kernel
    assert kernel.sine_weight.shape == (3, 5, 2)
    assert (kernel.input_scale, kernel.threshold, kernel.penalize_mask) == (3.0, 0.2, True)
    assert kernel.mask_sigma.tolist() == pytest.approx([0.3, 0.3])
    assert FlexSpec(kernel_size=np.int64(9), **values) == FlexSpec.of(kernel_size=9, **values)


# ---- frequencies


def test_the_mask_adds_two_deviations_of_the_wider_side():
    kernel = set_mask_(make(), [0.0, 0.0], [0.1, -0.25]).kernel
    added = kernel.max_frequency() - kernel.max_frequency(mask=False)
    assert added == pytest.approx(2 / (2 * math.pi * 0.25), rel=1e-4)
    assert make(mask=False).kernel.max_frequency() > 0


def test_the_highest_frequency_is_in_cycles_per_pixel():
    layer = make()
    assert layer.highest_frequency() == pytest.approx(
        0.5 * layer.kernel.max_frequency() / layer.kernel.nyquist_frequency
    )
    assert layer.to("meta").highest_frequency() is None


@pytest.mark.parametrize("with_mask", [False, True])
def test_penalty_is_the_papers_together_form(with_mask):
    layer = set_mask_(make(penalize_mask=with_mask, hidden_layers=2), [0.0, 0.0], [0.05, 0.08])
    w, gamma = (getattr(layer.kernel, name).detach().double().numpy() for name in ("sine_weight", "gamma"))
    nyquist, expected = (15 - 1) / 4, 0.0
    for level in range(3):
        channels = [(max(abs(w[level, i])) + 2 * min(gamma[level, i])) / (2 * math.pi) for i in range(w.shape[1])]
        frequency = max(channels) + (2 / (2 * math.pi * 0.08) / 3 if with_mask else 0)
        expected += (max(frequency, nyquist / 3) - nyquist / 3) ** 2  # Eq. 26
    assert layer.penalty().item() == pytest.approx(expected, rel=1e-5)


def regularised(seed: int, size: int = 17) -> FlexConv2d:
    """A layer whose penalty was minimised, to as good as zero."""
    torch.manual_seed(seed)
    layer = FlexConv2d(4, 4, size, initial_sigma=0.3, penalize_mask=True, input_scale=6.4)
    # without the mask, which would grow (section 4.3)
    optimizer = torch.optim.Adam([layer.kernel.sine_weight, layer.kernel.gamma], lr=0.2)
    for _ in range(3000):
        if (loss := layer.penalty()) < 1e-6:
            return layer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError("the penalty did not vanish")


def energy_above(layer: FlexConv2d, frequency: float) -> float:
    """Share of the spectrum's energy above a frequency (in cycles per unit) along either axis, densely sampled."""
    size, points = layer.kernel_size[0], 8 * (layer.kernel_size[0] - 1) + 1
    whole = FlexConv2d(4, 4, size, threshold=0.0)
    whole.load_state_dict(layer.state_dict())
    whole.kernel.output_bias.data.zero_()  # at the start most of a kernel is this constant, which has no frequency
    kernel = whole.at_resolution(size - 1, points - 1).weight.detach().double()
    spectrum = torch.fft.fft2(kernel, s=(4 * points, 4 * points)).abs().square().sum((0, 1))
    cycles = torch.fft.fftfreq(4 * points, 2 / (points - 1), dtype=torch.float64).abs()
    above = torch.maximum(cycles[:, None], cycles) > frequency
    return (spectrum[above].sum() / spectrum.sum()).item()


@pytest.mark.usefixtures("one_thread")
def test_regularised_kernels_have_negligible_energy_above_the_bound():
    layer = regularised(1)
    assert layer.kernel.max_frequency() <= layer.kernel.nyquist_frequency + 1e-3
    assert energy_above(layer, layer.kernel.max_frequency()) < 1e-4
    start = FlexConv2d(4, 4, 17, initial_sigma=0.3)
    assert energy_above(start, start.kernel.nyquist_frequency) > 5e-3, "kernels as they start are above"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_bandlimited_layer_gives_the_same_output_at_twice_the_resolution():
    layer = regularised(0)

    def image(size: int) -> Tensor:
        axis = (torch.arange(size) - (size - 1) / 2) * (16 / size)  # in pixels of the coarse image
        return torch.exp(-0.1 * (axis[:, None] ** 2 + (axis - 1) ** 2)).expand(1, 4, -1, -1)

    coarse = layer(image(16))
    fine = copy.deepcopy(layer).at_resolution(16, 32)(image(32))
    inner = (..., slice(3, -3), slice(3, -3))
    difference = torch.nn.functional.avg_pool2d(fine, 2) - coarse
    assert difference[inner].norm() < 0.03 * coarse[inner].norm()


@pytest.mark.usefixtures("one_thread")
def test_a_mask_learns_the_size_of_its_target():
    target = torch.zeros(1, 1, 21, 21)
    target[..., 4:17, 8:13] = torch.randn(13, 5)
    layer = FlexConv2d(1, 1, 21)
    assert set(layer.kernel.geometry_lr_scale.values()) == {0.1}
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
        layer.constrain_()
    tall, wide = layer.kernel.mask_sigma.tolist()
    assert tall > 1.5 * wide
