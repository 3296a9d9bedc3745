"""Kernel networks besides MAGNets, masks that turn, and where masks start."""

import math

import numpy as np
import pytest
import torch

import timm_contconv as tcc
from timm_contconv.layers.flex import FlexConv1d, FlexConv2d, FlexSpec
from timm_contconv.models.flex_tcn import FlexTCN

from .oracle import make, set_mask_


def direct_network(kernel, net: str, x: np.ndarray, omega: float = 30.0) -> np.ndarray:
    """A network at one point, by loops, in float64: Fathony et al. 2021, Eq. 4-8, and Sitzmann et al. 2020, Eq. 5."""
    p = {name: value.detach().double().numpy() for name, value in kernel.named_parameters()}
    if net == "siren":
        h = np.sin(omega * (p["sine_weight"] @ x + p["sine_bias"]))
        for weight, bias in zip(p["hidden_weight"], p["hidden_bias"], strict=True):
            h = np.sin(omega * (weight @ h + bias))
        return p["output_weight"] @ h + p["output_bias"]

    def filter_of(level: int) -> np.ndarray:
        g = np.sin(p["sine_weight"][level] @ x + p["sine_bias"][level])
        if net == "gabor":
            for channel in range(len(g)):
                square = sum((x[d] - p["mean"][level][channel][d]) ** 2 for d in range(len(x)))
                g[channel] *= math.exp(-p["gamma"][level][channel] / 2 * square)
        return g

    h = filter_of(0)
    for level in range(1, len(p["sine_bias"])):
        h = (p["hidden_weight"][level - 1] @ h + p["hidden_bias"][level - 1]) * filter_of(level)
    return p["output_weight"] @ h + p["output_bias"]


@pytest.mark.parametrize("net", ["gabor", "fourier", "siren"])
@pytest.mark.parametrize("sizes", [(5,), (4, 5)])
def test_networks_equal_direct_loops(net, sizes):
    layer = (FlexConv1d, FlexConv2d)[len(sizes) - 1](
        2, 3, sizes, hidden_channels=4, kernel_net=net, mask=False, dtype=torch.float64
    )
    expected = np.zeros((3, 2, *sizes))
    axes = [np.linspace(-1, 1, size) for size in sizes]
    for index in np.ndindex(*sizes):
        x = np.array([axis[i] for axis, i in zip(axes, index, strict=True)])
        expected[(slice(None), slice(None), *index)] = direct_network(layer.kernel, net, x)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-9, atol=1e-10)


# Tables 1 to 3: six blocks for one channel in and ten classes; FlexNet-7 is 0.67, 0.67, 0.66 and 0.63 M
@pytest.mark.parametrize(("net", "thousands"), [("magnet", 373), ("gabor", 373), ("fourier", 370), ("siren", 342)])
def test_sizes_are_those_of_the_papers_ablation(net, thousands):
    model = FlexTCN(1, 10, length=64, blocks=6, flex_args={"kernel_net": net}, device="meta")
    assert sum(p.numel() for p in model.parameters()) // 1000 == thousands


def draw(net: str, **options):
    return FlexConv2d(8, 8, 33, hidden_channels=500, kernel_net=net, **options).kernel


@pytest.mark.parametrize(("net", "gamma_init"), [("gabor", None), ("gabor", "by_layer"), ("magnet", "equal")])
def test_envelopes_start_as_the_paper_or_as_fathony_says(net, gamma_init):
    kernel = draw(net, gamma_init=gamma_init)
    for number in range(1, 5):
        mean = 6 / number if gamma_init == "by_layer" else 6 / 4
        assert kernel.gamma[number - 1].mean().item() == pytest.approx(mean, rel=0.1)
    scale = kernel.gamma if net == "magnet" else kernel.gamma.sqrt()[..., None]
    assert (kernel.sine_weight / scale).abs().max().item() == pytest.approx(25.6 / 2 / math.sqrt(2), rel=0.01)


def test_a_siren_starts_as_sitzmann_says():
    kernel = draw("siren")
    assert kernel.sine_weight.abs().max().item() == pytest.approx(1 / 2, rel=0.01)
    assert kernel.hidden_weight.abs().max().item() == pytest.approx(math.sqrt(6 / 500) / 30, rel=0.01)
    assert draw("siren", input_scale=10.0).output_weight.abs().max().item() <= math.sqrt(6 / 500) / 10
    assert draw("fourier").sine_weight.abs().max().item() == pytest.approx(25.6 / 2 / math.sqrt(2), rel=0.01)


@pytest.mark.parametrize("net", ["gabor", "fourier"])
def test_nearly_no_energy_lies_above_the_highest_frequency(net):
    layer = FlexConv2d(1, 1, 129, hidden_channels=4, hidden_layers=2, kernel_net=net, mask=False, input_scale=8.0)
    highest = layer.kernel.max_frequency()
    window = torch.hann_window(129, periodic=False)
    energy = torch.fft.fft2(layer.weight[0, 0] * window * window[:, None], s=(512, 512)).abs().square()
    cycles = torch.fft.fftfreq(512, 2 / 128).abs()
    above = torch.maximum(cycles[:, None], cycles) > highest + 2  # the window adds its own width
    assert (energy[above].sum() / energy.sum()).item() < 1e-3
    assert highest < 16


def test_a_siren_has_no_highest_frequency_and_no_penalty():
    layer = make(kernel_net="siren")
    assert layer.penalty() is None
    assert layer.highest_frequency() is None
    with pytest.raises(ValueError, match="kernel_net='siren': its kernels have no highest frequency"):
        layer.kernel.max_frequency()


def test_penalties_are_those_of_eq_25_and_26():
    together, summed = make(penalty_form="together"), make(penalty_form="summed")
    summed.load_state_dict(together.state_dict())
    weight, gamma = together.kernel.sine_weight.detach().numpy(), together.kernel.gamma.detach().numpy()
    parts = [
        max((abs(w).max() + 2 * abs(g).min()) / (2 * math.pi) for w, g in zip(ws, gs, strict=True))
        for ws, gs in zip(weight, gamma, strict=True)
    ]
    nyquist = (15 - 1) / 4
    assert together.penalty().item() == pytest.approx(sum(max(f - nyquist / 4, 0) ** 2 for f in parts), rel=1e-5)
    assert summed.penalty().item() == pytest.approx(max(sum(parts) - nyquist, 0) ** 2, rel=1e-5)
    assert summed.penalty() > 0


# ---- masks


def test_a_mask_can_start_at_the_first_element():
    layer = FlexConv1d(2, 3, 64, initial_mean=-1)
    assert layer.kernel.mask_mean.tolist() == [-1]
    assert layer.weight.detach()[..., 0].abs().min() > 0
    assert (layer.weight[..., 32:] == 0).all()
    assert layer.receptive_field()[0] < 40


def test_a_turned_mask_is_the_gaussian_in_turned_coordinates():
    layer = set_mask_(make(steerable=True, threshold=0.0, dtype=torch.float64), (0.1, -0.2), (0.2, 0.5))
    plain = make(mask=False, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "mask" not in k})
    angle = 0.6
    with torch.no_grad():
        layer.kernel.mask_angle.fill_(angle)
    mean, sigma = (value.detach().numpy() for value in (layer.kernel.mask_mean, layer.kernel.mask_sigma))
    axis = np.linspace(-1, 1, 15)
    mask = np.zeros((15, 15))
    for i, j in np.ndindex(15, 15):
        offset = np.array([axis[i], axis[j]]) - mean
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        mask[i, j] = math.exp(-0.5 * (((turn @ offset) / sigma) ** 2).sum())
    expected = plain.weight.detach().numpy() * mask
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 2, 2.5])
def test_the_crop_of_a_turned_mask_leaves_out_only_zeros(angle):
    layer = set_mask_(make(kernel_size=33, steerable=True), (0.1, 0.0), (0.05, 0.3))
    with torch.no_grad():
        layer.kernel.mask_angle.fill_(angle)
    whole = layer.train().weight.detach()  # the mask has changed since it was read: nothing is left out
    assert layer.kernel.margins is None
    layer.constrain_()
    assert max(map(sum, layer.kernel.margins)) > 0
    torch.testing.assert_close(layer.weight.detach(), whole, atol=1e-6, rtol=1e-5)
    x = torch.randn(1, 8, 20, 20)
    torch.testing.assert_close(layer.to_conv()(x), layer(x), atol=1e-4, rtol=1e-4)


def test_the_angle_learns_with_the_mask():
    model = torch.nn.Sequential(make(steerable=True))
    rates = {n: g["lr_scale"] for g in tcc.param_groups(model, 0.1, 0.05) for n in g["param_names"]}
    assert rates["0.kernel.mask_angle"] == rates["0.kernel.mask_sigma"] == 0.1


def test_the_narrowest_turned_mask_leaves_a_pixel():
    layer = set_mask_(make(steerable=True), (1 / 14, 1 / 14), (1e-3, 1e-3))
    with torch.no_grad():
        layer.kernel.mask_angle.fill_(math.pi / 4)
    layer.constrain_()
    assert layer.weight.detach().flatten(2).any(-1).all()


# ---- warm start, settings


@pytest.mark.parametrize("net", ["gabor", "fourier", "siren"])
def test_small_kernels_are_fitted_by_the_last_layer(net):
    conv = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6)
    layer = FlexConv2d.from_conv(conv, FlexSpec(kernel_size=15, kernel_net=net))
    assert layer.fit_error(conv) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_net": "mlp"}, "kernel_net='mlp': expected 'magnet', 'gabor', 'fourier' or 'siren'"),
        ({"kernel_net": "siren", "hidden_layers": 1}, "hidden_layers=1: expected at least 2 for a SIREN"),
        ({"kernel_net": "siren", "gamma_init": "equal"}, "gamma_init='equal': expected None with kernel_net='siren'"),
        ({"initial_mean": 1.5}, "initial_mean=1.5: expected at most 1"),
        ({"penalty_form": "mean"}, "penalty_form='mean': expected 'together' or 'summed'"),
        ({"steerable": 1}, "steerable=1: expected True or False"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_mask_of_one_dimension_can_not_turn():
    with pytest.raises(ValueError, match="steerable=True: expected False in 1 dimension"):
        FlexConv1d(2, 2, 9, steerable=True)
    assert "steerable=True" in FlexSpec(kernel_size=9, steerable=True).refusal(torch.nn.Conv1d(2, 2, 3, padding=1))
