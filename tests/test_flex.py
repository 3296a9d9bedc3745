"""FlexConv kernels are those of the paper's equations, crops change nothing but the cost, frequencies are known."""

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import timm_contconv as tcc
from tests.flexnet_peer import ReleasedFlexConv
from timm_contconv import viz
from timm_contconv.layers import FlexConv1d, FlexConv2d, MAGNet
from timm_contconv.layers.flex import FlexSpec
from timm_contconv.layers.magnet import filter_frequencies, gabor_filters

MAGNET = ("sine_weight", "sine_bias", "mean", "gamma", "hidden_weight", "hidden_bias", "output_weight", "output_bias")


def direct_kernel(
    layer: FlexConv1d | FlexConv2d, crop: bool = True, axes: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Eq. 1-8, one point of the grid at a time, in float64; then the crop of Fig. 7."""
    p = {name: getattr(layer, name).detach().double().numpy() for name in MAGNET}
    if axes is None:
        axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in layer.kernel_size]
    kernel = np.zeros((*p["output_bias"].shape, *layer.kernel_size))

    def gabor(level: int, x: np.ndarray) -> np.ndarray:
        envelope = np.exp(-0.5 * ((p["gamma"][level] * (x - p["mean"][level])) ** 2).sum(1))
        return envelope * np.sin(p["sine_weight"][level] @ x + p["sine_bias"][level])

    for index in np.ndindex(*layer.kernel_size):
        x = np.array([axis[i] for axis, i in zip(axes, index, strict=True)])
        h = gabor(0, x)
        for level in range(1, len(p["sine_bias"])):
            h = (p["hidden_weight"][level - 1] @ h + p["hidden_bias"][level - 1]) * gabor(level, x)
        psi = p["output_weight"] @ h + p["output_bias"]
        if layer.mask:
            mean, sigma = (layer.geometry[n].detach().double().numpy() for n in ("mask_mean", "mask_sigma"))
            factors = np.exp(-0.5 * ((x - mean) / sigma) ** 2)
            psi = psi * factors.prod() if not crop or (factors >= 0.1).all() else 0 * psi
        kernel[(slice(None), slice(None), *index)] = psi
    return kernel


def make(**options) -> FlexConv2d:
    return FlexConv2d(8, 8, **{"kernel_size": 15, "groups": 8, "hidden_channels": 6, **options})


def set_mask_(layer, mean, sigma):
    with torch.no_grad():
        layer.geometry["mask_mean"].copy_(torch.tensor(mean))
        layer.geometry["mask_sigma"].copy_(torch.tensor(sigma))
    return layer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 12, 11)


# ---- the kernel


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
            layer.geometry["mask_mean"].uniform_(-0.6, 0.6)
            layer.geometry["mask_sigma"].uniform_(-0.8, 0.8)
    np.testing.assert_allclose(layer.construct().detach().numpy(), direct_kernel(layer), rtol=1e-9, atol=1e-11)


def test_without_a_threshold_the_kernel_is_magnet_times_mask():
    layer = make(threshold=0.0, dtype=torch.float64)
    np.testing.assert_allclose(layer.weight.detach().numpy(), direct_kernel(layer, crop=False), rtol=1e-9, atol=1e-12)


def test_float32_construction_agrees_with_float64_at_33_by_33():
    layer = FlexConv2d(2, 3, 33, initial_sigma=0.4)
    kernel = direct_kernel(layer)
    np.testing.assert_allclose(layer.construct().detach().numpy(), kernel, atol=1e-4 * np.abs(kernel).max())


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
        "geometry.mask_sigma": peer.mask_params[:, 1],
    }
    with torch.no_grad():
        for name, value in values.items():
            layer.get_parameter(name).copy_(value)
        peer.axis = lambda d: torch.linspace(-1, 1, 21, dtype=torch.float64)[4:17]  # the release's crop, in float64
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x), atol=1e-9, rtol=1e-9)


def test_kernel_gradients():
    layer = make(kernel_size=(5, 4), groups=4, hidden_channels=3, dtype=torch.float64, initial_sigma=0.5)
    names = [name for name, _ in layer.named_parameters() if name != "bias"]
    values = [p for name, p in layer.named_parameters() if name != "bias"]

    class Construct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self) -> Tensor:
            return self.layer.construct()

    def run(*values):
        return torch.func.functional_call(Construct(), dict(zip([f"layer.{n}" for n in names], values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(values))


def test_gabor_filters_on_a_grid_equal_those_at_its_points():
    weight, mean, gamma = torch.randn(3, 5, 2, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    axes = [torch.linspace(-1, 1, 6, dtype=torch.float64), torch.linspace(-1, 1, 7, dtype=torch.float64)]
    grid = torch.cartesian_prod(*axes)
    envelope = torch.exp(-0.5 * (gamma * (grid[:, None] - mean)).square().sum(-1))
    expected = (envelope * torch.sin(grid @ weight.T + bias)).T.reshape(5, 6, 7)
    torch.testing.assert_close(gabor_filters(weight, bias, mean, gamma, axes), expected)


def test_magnet_is_the_kernel_without_mask():
    torch.manual_seed(1)
    layer = FlexConv2d(3, 4, 9, mask=False)
    magnet = MAGNet(2, 12)
    with torch.no_grad():
        for name, value in magnet.named_parameters():
            value.copy_(getattr(layer, name).reshape(value.shape))
    axis = torch.linspace(-1, 1, 9)
    torch.testing.assert_close(magnet(axis, axis).view(4, 3, 9, 9), layer.weight, atol=1e-5, rtol=1e-5)


# ---- initial values


def test_initial_values_are_those_of_the_paper_and_the_release():
    layer = FlexConv2d(64, 64, 33, hidden_channels=400)
    assert layer.geometry["mask_mean"].tolist() == [0, 0]
    assert layer.geometry["mask_sigma"].tolist() == [0.125, 0.125]
    for number in range(1, 5):  # Gamma(6 / l, 1): mean and variance 6 / l
        gamma = layer.gamma[number - 1].detach()
        assert gamma.mean().item() == pytest.approx(6 / number, rel=0.1)
        assert gamma.var().item() == pytest.approx(6 / number, rel=0.2)
    speed = (layer.sine_weight / layer.gamma).detach()  # uniform, 25.6 / sqrt(4) / sqrt(2) at most
    assert speed.abs().max().item() == pytest.approx(25.6 / 2 / math.sqrt(2), rel=0.01)
    assert speed.std().item() == pytest.approx(25.6 / 2 / math.sqrt(2) / math.sqrt(3), rel=0.05)
    assert layer.mean.abs().max().item() == pytest.approx(1, abs=0.01)
    assert layer.sine_bias.abs().max().item() == pytest.approx(math.pi, rel=0.01)


def test_causal_masks_start_at_the_newest_sample():
    layer = FlexConv1d(2, 3, 64)
    assert layer.geometry["mask_mean"].tolist() == [1]
    assert layer.weight.detach()[..., -1].abs().min() > 0
    assert (layer.weight[..., :32] == 0).all()


@pytest.mark.parametrize("layer_type", [FlexConv1d, FlexConv2d])
@pytest.mark.parametrize("size", range(1, 7))
def test_kernels_of_few_pixels_start_with_some(layer_type, size):
    layer = layer_type(2, 3, size)
    assert (layer.weight.detach() != 0).any(-1 if layer_type is FlexConv1d else (-1, -2)).all()


# ---- the crop


MASKS = [
    ([0.0, 0.0], [0.2, 0.4]),
    ([0.4, -0.7], [0.1, 0.2]),
    ([-1.0, 1.0], [0.3, 0.05]),
    ([0.03, 0.03], [1e-3, 2.0]),
    ([5.0, 0.0], [0.1, 0.1]),
]


@pytest.mark.parametrize(("mean", "sigma"), MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 7},
        {"padding": 2, "stride": 2},
        {"padding": "valid", "kernel_size": 9},
        {"stride": 2, "kernel_size": 10},
        {"groups": 1, "bias": False},
        {"padding": (7, 9), "padding_mode": "reflect", "kernel_size": (15, 19)},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_cropped_convolution_equals_that_with_the_whole_kernel(mean, sigma, options, training, x):
    layer = set_mask_(make(**options).train(training), mean, sigma)
    whole = set_mask_(make(**options, threshold=0.0), mean, sigma)
    whole.load_state_dict(layer.state_dict())
    visible = layer.weight != 0
    expected = whole.to_conv()
    with torch.no_grad():
        expected.weight.mul_(visible)
    torch.testing.assert_close(layer(x), expected(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.to_conv()(x), expected(x), atol=1e-5, rtol=1e-4)


def test_the_convolution_really_shrinks(x):
    layer = FlexConv2d(8, 8, 33)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    convolved = counter.get_flop_counts()["Global"]
    taps = next(value for op, value in convolved.items() if "conv" in str(op)) // (2 * 2 * 8 * 8 * 12 * 11)
    assert layer.crop() == ((12, 21), (12, 21))
    assert taps == 81
    assert layer.to_conv().kernel_size == (9, 9)
    assert layer.multiply_adds((12, 11)) == 12 * 11 * 8 * 8 * 81


def test_crops_have_few_sizes():
    layer = FlexConv2d(1, 1, 33)
    sizes = set()
    for sigma in np.linspace(0.01, 1, 300).tolist():
        (first, end), _ = set_mask_(layer, [0.0, 0.0], [sigma, sigma]).crop()
        sizes.add(end - first)
        reach = sigma * math.sqrt(-2 * math.log(0.1)) * 16
        assert (end - first) // 2 >= min(math.floor(reach), 16)
        assert (end - first) // 2 <= math.floor(reach) + 2
    assert len(sizes) <= 9


def test_the_crop_follows_every_change_of_the_mask(x):
    layer = make().eval()
    changes = [
        lambda: set_mask_(layer, [0.0, 0.0], [0.5, 0.5]),
        lambda: layer.geometry["mask_sigma"].data.fill_(0.05),
        lambda: layer.load_state_dict(set_mask_(make(), [0.2, 0.0], [0.3, 0.6]).state_dict()),
        lambda: layer.train(),
        lambda: layer.geometry["mask_mean"].data.fill_(-0.5),
        lambda: layer.eval().double().float(),
    ]
    with torch.no_grad():
        for change in changes:
            layer(x)
            change()
            expected = F.conv2d(x, torch.from_numpy(direct_kernel(layer)).float(), layer.bias, padding=7, groups=8)
            torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_looking_rarely_leaves_room_for_the_mask_to_grow(x):
    layer = make(kernel_size=33, crop_every=4).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(20):
            set_mask_(layer, [0.002 * step] * 2, [0.125 + 0.002 * step] * 2)
            expected = F.conv2d(x, layer.to_conv().weight.detach(), layer.bias, padding="same", groups=8)
            kernel = torch.from_numpy(direct_kernel(layer)).float() if step % 7 == 0 else None
            if kernel is not None:
                expected = F.conv2d(x, kernel, layer.bias, padding=16, groups=8)
                torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
            else:
                layer(x)


def test_a_mask_that_outgrows_its_crop_is_reported(x):
    layer = make(kernel_size=33, crop_every=3).train()
    layer(x)
    set_mask_(layer, [0.0, 0.0], [0.5, 0.5])
    layer(x), layer(x)
    with pytest.warns(RuntimeWarning, match="grew out of its crop in 3 training steps"):
        layer(x)
    assert layer.crop() == ((0, 33), (0, 33))


def test_constraint_keeps_a_pixel_of_the_mask():
    layer = set_mask_(make(kernel_size=33), [-3.0, 0.4], [-0.2, 1e-9])
    tcc.constrain_(nn.Sequential(layer))
    assert layer.geometry["mask_mean"].tolist() == pytest.approx([-1, 0.4])
    assert layer.geometry["mask_sigma"][0].item() == pytest.approx(0.2)
    assert (layer.weight.detach() != 0).any((0, 1, 2)).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 5, 8, 33])
def test_constraint_keeps_a_pixel_wherever_the_mask_is(dtype, size):
    layer = FlexConv1d(1, 1, size, padding="same", dtype=dtype)
    for pixel in np.arange(0, size - 0.9, 0.5):  # on pixels, and half-way between two
        set_mask_(layer, [2 * pixel / (size - 1) - 1], [0.0])
        tcc.constrain_(layer)
        assert layer.weight.any(), f"pixel {pixel}"


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"mask": False}])
def test_constraint_and_cadence_are_of_no_concern_where_nothing_is_cropped(options, x):
    layer = make(**options, crop_every=2).train()
    for _ in range(3):
        layer(x)
        tcc.constrain_(layer)
    assert layer.crop() == ((0, 15), (0, 15))


def test_constraints_are_the_steps_once_they_are_called(x):
    layer = make(kernel_size=33, crop_every=4).train()
    layer(x)
    tcc.constrain_(layer)
    set_mask_(layer, [0.0, 0.0], [0.18, 0.18])
    sizes = []
    for _ in range(4):
        layer(x), layer(x), layer(x)
        sizes.append(layer.receptive_field()[0])
        tcc.constrain_(layer)
    assert sizes == [13, 13, 13, 17], "the fourth constraint looks, the ninth forward pass did not"


@pytest.mark.parametrize(("constrain", "crop_every"), [(True, 2), (False, 3)])
def test_checkpointed_passes_meet_the_crop_of_the_first_time(constrain, crop_every, x):
    layer = make(kernel_size=33, crop_every=crop_every).train()
    sizes = set()
    for step in range(30):
        set_mask_(layer, [0.0, 0.0], [0.1 + 0.01 * step] * 2)
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        if constrain:
            tcc.constrain_(layer)
        sizes.add(layer.receptive_field())
    assert len(sizes) > 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_that_is_not_finite_is_refused(value, x):
    layer = make()
    layer.geometry["mask_sigma"].data[1] = value
    with pytest.raises(ValueError, match="mask: mean .* sigma .* expected finite numbers; go back"):
        layer(x)


def test_sigma_zero_gives_finite_gradients(x):
    layer = set_mask_(make(), [0.0, 0.0], [0.0, 0.0])
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_compiled_training_crops_once_constraints_follow(x):
    graphs = []

    def backend(graph, inputs):
        convolutions = [n for n in graph.graph.nodes if "depthwise_conv" in str(n.target)]
        graphs.append([tuple(n.args[1].meta["example_value"].shape[2:]) for n in convolutions])
        return graph

    torch._dynamo.reset()
    layer = make(kernel_size=33)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    compiled(x)
    for sigma in (0.125, 0.126, 0.127, 0.128, 0.25):
        set_mask_(layer, [0.0, 0.0], [sigma, sigma])
        tcc.constrain_(layer)
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-4, rtol=1e-4)
    assert graphs == [[(33, 33)], [(9, 9)], [(17, 17)]], "one graph per size of the crop"
    layer.eval()(x)
    layer.train()
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 3, "a crop survives an evaluation"


# ---- CKConv


def test_without_a_mask_there_is_nothing_to_crop(x):
    layer = make(mask=False)
    assert len(layer.geometry) == 0
    assert layer.crop() == ((0, 15), (0, 15))
    torch.testing.assert_close(
        layer(x), F.conv2d(x, layer.weight, layer.bias, padding=7, groups=8), atol=1e-4, rtol=1e-4
    )
    tcc.constrain_(layer)


# ---- one dimension


def test_causal_output_has_the_length_of_the_input_and_does_not_see_the_future():
    layer = set_mask_(FlexConv1d(3, 4, 20), [0.7], [0.2])
    x = torch.randn(2, 3, 20)
    other = x.clone()
    other[..., 12:] = torch.randn(2, 3, 8)
    y, y_other = layer(x), layer(other)
    assert y.shape == (2, 4, 20)
    torch.testing.assert_close(y[..., :12], y_other[..., :12])
    torch.testing.assert_close(y, F.conv1d(F.pad(x, (19, 0)), layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.to_conv()(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_causal_layers_take_sequences_of_any_length(length):
    layer = set_mask_(FlexConv1d(2, 2, 21), [0.0], [0.1])
    x = torch.randn(1, 2, length)
    torch.testing.assert_close(layer(x), F.conv1d(F.pad(x, (20, 0)), layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_causal_kernel_of_16000_samples_convolves_as_scipy_does(groups):
    layer = FlexConv1d(3, 3, 16000, groups=groups, initial_sigma=1.0)
    x = torch.randn(1, 3, 16000)
    kernel = layer.weight.detach().double().numpy()[..., ::-1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = layer(x)
    for out in range(3):
        sources = [out] if groups == 3 else range(3)
        expected = sum(fftconvolve(x[0, i].double().numpy(), kernel[out, i % kernel.shape[1]])[:16000] for i in sources)
        np.testing.assert_allclose(y[0, out].detach().numpy(), expected, atol=1e-4 * np.abs(expected).max())
    names = {event.name for event in profile.events()}
    assert any("fft" in name for name in names)
    assert "aten::convolution" not in names


# ---- frequencies


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


def test_the_mask_adds_two_deviations_of_the_wider_side():
    layer = set_mask_(make(), [0.0, 0.0], [0.1, -0.25])
    assert layer.max_frequency() - layer.max_frequency(mask=False) == pytest.approx(2 / (2 * math.pi * 0.25), rel=1e-4)
    assert make(mask=False).max_frequency() > 0


@pytest.mark.parametrize("with_mask", [False, True])
def test_penalty_is_the_papers_together_form(with_mask):
    layer = set_mask_(make(penalize_mask=with_mask, hidden_layers=2), [0.0, 0.0], [0.05, 0.08])
    w, gamma = layer.sine_weight.detach().double().numpy(), layer.gamma.detach().double().numpy()
    nyquist, expected = (15 - 1) / 4, 0.0
    for level in range(3):
        channels = [
            (max(abs(w[level, i])) + 2 * min(gamma[level, i])) / (2 * math.pi) for i in range(layer.hidden_channels)
        ]
        frequency = max(channels) + (2 / (2 * math.pi * 0.08) / 3 if with_mask else 0)
        expected += (max(frequency, nyquist / 3) - nyquist / 3) ** 2  # Eq. 26
    assert layer.penalty().item() == pytest.approx(expected, rel=1e-5)
    assert tcc.penalty(nn.Sequential(layer, nn.ReLU())).item() == pytest.approx(expected, rel=1e-5)


def regularised(seed: int, with_mask: bool = True, size: int = 17) -> FlexConv2d:
    """A layer whose penalty was minimised, to as good as zero."""
    torch.manual_seed(seed)
    layer = FlexConv2d(4, 4, size, initial_sigma=0.3, penalize_mask=with_mask, input_scale=6.4)
    optimizer = torch.optim.Adam([layer.sine_weight, layer.gamma], lr=0.2)  # the mask would grow, section 4.3
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
    dense = copy.deepcopy(layer)
    dense.threshold = 0.0
    dense.output_bias.data.zero_()  # at the start most of a kernel is this constant, which has no frequency
    kernel = dense.at_resolution(size - 1, points - 1).weight.detach().double()
    spectrum = torch.fft.fft2(kernel, s=(4 * points, 4 * points)).abs().square().sum((0, 1))
    cycles = torch.fft.fftfreq(4 * points, 2 / (points - 1), dtype=torch.float64).abs()
    above = torch.maximum(cycles[:, None], cycles) > frequency
    return (spectrum[above].sum() / spectrum.sum()).item()


def test_regularised_kernels_have_negligible_energy_above_the_bound():
    shares = []
    for seed in range(2):
        layer = regularised(seed)
        assert layer.max_frequency() <= layer.nyquist_frequency + 1e-3
        shares.append(energy_above(layer, layer.max_frequency()))
    assert max(shares) < 1e-4
    start = FlexConv2d(4, 4, 17, initial_sigma=0.3)
    assert energy_above(start, start.nyquist_frequency) > 5e-3, "kernels as they start are above"


def test_frequencies_are_drawn_as_the_layers_report_them():
    model = nn.Sequential(make(), make(mask=False))
    axis = viz.frequency_figure(model).axes[0]
    heights = [bar.get_height() for bar in axis.patches]
    drawn = [heights[0] + heights[2], heights[1] + heights[3]]
    assert drawn == pytest.approx([layer.max_frequency() for layer in model], rel=1e-5)
    with pytest.raises(ValueError, match="holds no FlexConv"):
        viz.frequency_figure(nn.Linear(1, 1))


# ---- resolution


def test_a_denser_kernel_takes_the_same_values_where_the_grids_meet_scaled():
    layer = FlexConv2d(3, 4, 17, initial_sigma=0.5)
    before = layer.weight.detach()
    assert layer.at_resolution(16, 32) is layer
    assert layer.kernel_size == (33, 33)
    torch.testing.assert_close(4 * layer.weight.detach()[..., ::2, ::2], before, atol=1e-5, rtol=1e-4)
    layer.at_resolution(32, 16)
    torch.testing.assert_close(layer.weight.detach(), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "source", "target"), [(7, 224, 256), (33, 32, 33), (33, 32, 35), (31, 224, 256), (31, 224, 112)]
)
def test_a_kernel_keeps_its_sum_at_any_resolution(size, source, target):
    layer = FlexConv2d(1, 1, size, initial_sigma=0.3, threshold=0.0, input_scale=0.1, dtype=torch.float64)
    before = layer.weight.sum().item()
    after = layer.at_resolution(source, target).weight.sum().item()
    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("mean", [0.0, 0.45])
@pytest.mark.parametrize(
    ("size", "source", "target", "expected"),
    [(7, 224, 256, 7), (15, 14, 15, 15), (15, 14, 23, 23), (10, 9, 14, 14), (15, 14, 6, 7), (2, 4, 1, 1)],
)
def test_pixels_are_a_step_apart_about_the_centre(size, source, target, expected, mean, x):
    layer = set_mask_(make(kernel_size=size), [mean, 0.0], [0.3, 0.6]).at_resolution(source, target)
    assert layer.kernel_size == (expected, expected)
    step = 2 / (size - 1) * source / target
    axis = (np.arange(expected) - (expected - 1) / 2) * step
    kernel = torch.from_numpy(direct_kernel(layer, axes=[axis, axis]) * (source / target) ** 2).float()
    torch.testing.assert_close(layer.weight.detach(), kernel, atol=1e-5, rtol=1e-4)
    before, after = (expected - 1) // 2, expected // 2
    y = F.conv2d(F.pad(x, (before, after, before, after)), kernel, layer.bias, groups=8)
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.to_conv()(x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "source", "target", "expected"), [(8, 8, 16, 15), (20, 20, 27, 27), (21, 10, 3, 7)])
def test_pixels_of_causal_kernels_are_a_step_apart_from_the_newest(size, source, target, expected):
    layer = set_mask_(FlexConv1d(2, 2, size), [0.8], [0.4]).at_resolution(source, target)
    assert layer.kernel_size == (expected,)
    axis = 1 - np.arange(expected)[::-1] * 2 / (size - 1) * source / target
    kernel = torch.from_numpy(direct_kernel(layer, axes=[axis]) * source / target).float()
    x = torch.randn(1, 2, 30)
    y = F.conv1d(F.pad(x, (expected - 1, 0)), kernel, layer.bias)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.to_conv()(x), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("resolutions", [(224, 112, 224), (32, 20, 32), (32, 33, 7, 32), (224, 256, 300, 224)])
@pytest.mark.parametrize("options", [{"kernel_size": 31}, {"kernel_size": 8}, {"kernel_size": 9, "padding": (0, 3)}])
def test_turns_there_and_back_leave_a_layer_as_it_was(resolutions, options):
    layer = make(**options)
    before, padding = layer.weight.detach(), layer.padding
    for source, target in itertools.pairwise(resolutions):
        layer.at_resolution(source, target)
    assert layer.padding == padding
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "padding"), [(7, 0), (7, 1), (8, 0), (3, 0), (5, (0, 4))])
@pytest.mark.parametrize(("source", "target"), [(224, 256), (224, 200), (7, 3), (10, 11)])
def test_a_layer_at_any_resolution_has_padding_and_merges(size, padding, source, target):
    layer = FlexConv2d(1, 1, size, padding=padding, mask=False).at_resolution(source, target)
    assert min(layer.padding) >= 0
    x = torch.randn(1, 1, 20, 20)
    torch.testing.assert_close(tcc.merge(nn.Sequential(layer))(x), layer(x), atol=1e-5, rtol=1e-4)


def test_a_layer_at_another_resolution_is_copied_compiled_exported_and_traced(x):
    layer = make().eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for source, target in ((7, 8), (8, 15), (15, 4)):
        expected = layer.at_resolution(source, target)(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        exported = torch.export.export(layer, (x,)).module(check_guards=False)
        for graph in (compiled, exported, torch.fx.symbolic_trace(layer)):
            torch.testing.assert_close(graph(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", ["same", 8, 5, 0])
def test_output_keeps_its_place_at_another_resolution(padding):
    layer = FlexConv2d(1, 1, 17, padding=padding)
    shrink = 24 - layer(torch.randn(1, 1, 24, 24)).shape[-1]
    layer.at_resolution(16, 32)
    assert 48 - layer(torch.randn(1, 1, 48, 48)).shape[-1] == 2 * shrink


def test_a_bandlimited_layer_gives_the_same_output_at_twice_the_resolution():
    layer = regularised(0)

    def image(size: int) -> Tensor:
        axis = (torch.arange(size) - (size - 1) / 2) * (16 / size)  # in pixels of the coarse image
        return torch.exp(-0.1 * (axis[:, None] ** 2 + (axis - 1) ** 2)).expand(1, 4, -1, -1)

    coarse = layer(image(16))
    fine = copy.deepcopy(layer).at_resolution(16, 32)(image(32))
    down = F.avg_pool2d(fine, 2)
    inner = (..., slice(3, -3), slice(3, -3))
    assert (down - coarse)[inner].norm() < 0.03 * coarse[inner].norm()


def test_resolution_of_a_whole_model_and_what_is_left_alone():
    model = nn.Sequential(make(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    with pytest.warns(UserWarning, match="1 plain convolutions keep their kernels at the new resolution: 1"):
        assert tcc.at_resolution(model, 14, 28) is model
    assert model[0].kernel_size == (29, 29)
    with pytest.raises(ValueError, match="holds no FlexConv"):
        tcc.at_resolution(nn.Conv2d(1, 1, 3), 14, 28)
    with pytest.raises(ValueError, match="target=0: expected a positive int"):
        tcc.at_resolution(model, 28, 0)
    with pytest.raises(ValueError, match="source=True: expected a positive int"):
        tcc.at_resolution(model, True, 28)
    assert model[0].kernel_size == (29, 29)


# ---- learning


def test_masks_learn_ten_times_slower_and_are_not_decayed():
    groups = tcc.param_groups(nn.Sequential(make()), lr=1.0, weight_decay=0.1)
    settings = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    assert settings["0.geometry.mask_mean"] == settings["0.geometry.mask_sigma"] == (0.1, 0.0)
    assert settings["0.output_weight"] == (1.0, 0.1)


@pytest.mark.usefixtures("one_thread")
def test_a_mask_learns_the_size_of_its_target():
    torch.manual_seed(0)
    target = torch.zeros(1, 1, 21, 21)
    target[..., 4:17, 8:13] = torch.randn(13, 5)
    layer = FlexConv2d(1, 1, 21)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
        layer.constrain_()
    tall, wide = layer.geometry["mask_sigma"].tolist()
    assert tall > 1.5 * wide


# ---- in place of plain convolutions


@pytest.mark.parametrize(("size", "hidden"), [(1, 32), (3, 32), (5, 32), (7, 64)])
@pytest.mark.parametrize("groups", [1, 8])
def test_small_kernels_are_reproduced(size, hidden, groups):
    conv = nn.Conv2d(8, 8, size, padding=size // 2, groups=groups)
    layer = FlexConv2d.from_conv(conv, FlexSpec(kernel_size=21, hidden_channels=hidden))
    x = torch.randn(2, 8, 16, 16)
    assert layer.fit_error(conv) < 2e-4
    assert layer.crop() == (((21 - size) // 2, (21 + size) // 2),) * 2
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
    x = torch.randn(2, 6, 40)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-3, rtol=1e-3)


def test_a_model_is_patched_merged_and_unpatched(x):
    model = timm.create_model("test_convnext", num_classes=4).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        tcc.patch(model, "flex", hidden_channels=64)
        errors = [row.fit_error for row in tcc.report(model).rows]
        assert max(errors) < 2e-4
        torch.testing.assert_close(model(images), expected, atol=1e-3, rtol=1e-3)
        merged = tcc.merge(model)
        torch.testing.assert_close(merged(images), model(images), atol=1e-4, rtol=1e-4)
        assert {m.kernel_size for m in merged.modules() if isinstance(m, nn.Conv2d) and m.groups > 1} == {(7, 7)}


# ---- the contract of the package's layers

KINDS = [{}, {"mask": False}, {"groups": 1}, {"threshold": 0.0, "compile": False}]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_keep_the_output(kind, x):
    layer = make(**kind).eval()
    expected = layer(x)
    loaded = make(**kind).eval()
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*MAGNET, "mask_mean", "mask_sigma"])
def test_kept_kernel_follows_every_parameter(name, x):
    layer = make(initial_sigma=0.4).eval()
    with torch.no_grad():
        before = layer(x)
        dict(layer.named_parameters(), **layer.geometry)[name].add_(0.3)
        assert (layer(x) - before).abs().max() > 1e-4
        torch.testing.assert_close(layer.weight, layer.construct(), rtol=0, atol=0)


def test_kept_kernel_follows_ema_updates(x):
    model = nn.Sequential(make())
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for _ in range(3):
            ema.module(x)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
            ema.update(model)
            assert torch.equal(ema.module[0].weight, ema.module[0].construct())


@pytest.mark.parametrize("layer_type", [FlexConv1d, FlexConv2d])
def test_meta_layer_is_materialised_by_reset_parameters(layer_type):
    layer = layer_type(4, 4, 9, groups=4, device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.construct().isfinite().all()
    assert layer.construct().abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_exported_and_traced_layers_equal_eager(kind, training, x):
    layer = make(**kind).train(training)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)
    exported = torch.export.export(layer, (x,)).module(check_guards=False)
    torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-4)
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), expected, atol=1e-5, rtol=1e-4)
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in layer.named_parameters()}


def test_a_traced_causal_layer_equals_eager():
    layer, x = FlexConv1d(2, 3, 16).eval(), torch.randn(1, 2, 16)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x), atol=1e-5, rtol=1e-4)


def test_traced_graphs_follow_the_mask(x):
    layer = make().eval()
    traced = torch.fx.symbolic_trace(layer)
    set_mask_(layer, [0.0, 0.3], [0.6, 0.2])
    torch.testing.assert_close(traced(x), layer(x), atol=1e-5, rtol=1e-4)


def test_construction_compiled_by_inductor_equals_eager_for_all_crops():
    layer, compiled = make(), make(compile=True)
    for sigma in (0.3, 0.6):
        set_mask_(layer, [0.1, 0.0], [sigma, sigma / 2])
        compiled.load_state_dict(layer.state_dict())
        torch.testing.assert_close(compiled.construct(), layer.construct(), atol=1e-5, rtol=1e-4)


def test_channels_last_input_gives_the_same_output(x):
    for options in ({}, {"groups": 1}):
        layer = set_mask_(make(**options), [0.4, 0.0], [0.1, 0.2])
        last = layer(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, layer(x), atol=1e-5, rtol=1e-4)


def test_under_autocast_the_kernel_is_constructed_in_float32(x):
    layer = make()
    expected, expected_output = layer.construct(), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.construct(), expected, rtol=0, atol=0)
        y = layer(x)
    assert (y.float() - expected_output).abs().max() < 0.03 * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_construct_in_float32(dtype):
    layer = make().to(dtype)
    expected = copy.deepcopy(layer).float().construct().to(dtype)
    torch.testing.assert_close(layer.construct(), expected, rtol=0, atol=0)


def test_gradcheck_of_a_float64_layer():
    layer = make(kernel_size=5, hidden_channels=2, hidden_layers=1, dtype=torch.float64, initial_sigma=0.5)
    x = torch.randn(1, 8, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_channels": 0}, "hidden_channels=0: expected a positive int"),
        ({"hidden_channels": True}, "hidden_channels=True: expected a positive int"),
        ({"hidden_layers": 0}, "hidden_layers=0: expected a positive int"),
        ({"input_scale": 0}, "input_scale=0: expected a positive number"),
        ({"input_scale": "a"}, "input_scale='a': expected a positive number"),
        ({"mask": "no"}, "mask='no': expected True or False"),
        ({"penalize_mask": 1}, "penalize_mask=1: expected True or False"),
        ({"initial_sigma": "x"}, "initial_sigma='x': expected at least"),
        ({"initial_sigma": 0}, "initial_sigma=0: expected at least"),
        ({"initial_sigma": math.nan}, "initial_sigma=nan: expected at least"),
        ({"threshold": 1}, "threshold=1: expected at least 0"),
        ({"threshold": None}, "threshold=None: expected at least 0"),
        ({"crop_every": 0}, "crop_every=0: expected a positive int"),
        ({"crop_every": 1.5}, "crop_every=1.5: expected a positive int"),
        ({"kernel_size": 0}, "kernel_size=0: expected a positive int"),
        ({"dilation": 2}, "dilation=2: expected 1"),
        ({"padding": "causal"}, "padding='causal': expected"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match="expected") as caught:
        make(**options)
    assert message in str(caught.value)


def test_what_magnets_do_not_have_is_refused():
    with pytest.raises(ValueError, match="ndim=3: expected 1 or 2"):
        MAGNet(3, 4)
    with pytest.raises(ValueError, match="out_channels=0: expected a positive int"):
        MAGNet(2, 0)
    with pytest.raises(ValueError, match="1 coordinates: expected 2 tensors"):
        MAGNet(2, 4)(torch.zeros(3))
    with pytest.raises(ValueError, match="padding_mode='reflect': expected 'zeros'; causal"):
        FlexConv1d(1, 1, 9, padding_mode="reflect")


def test_settings_reach_the_layer():
    values = {"hidden_channels": 5, "hidden_layers": 2, "input_scale": 3.0, "mask": True, "initial_sigma": 0.3}
    values |= {"threshold": 0.2, "penalize_mask": True, "crop_every": 7}
    layer = FlexConv2d.in_place_of(nn.Conv2d(4, 4, 3, padding=1), FlexSpec(kernel_size=9, **values))
    assert {name: getattr(layer, name) for name in values} == values
    assert list(itertools.chain(layer.kernel_size, layer.padding)) == [9, 9, 4, 4]
