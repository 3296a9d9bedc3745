"""The crop changes nothing but the cost, and is never that of another mask."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from timm_contconv.layers.core.geometry import share_geometry
from timm_contconv.layers.flex import FlexConv1d, FlexConv2d

from .oracle import direct_kernel, make, set_mask_

WIDE = ((0, 0), (0, 0))  # margins of a mask that leaves the whole kernel


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 12, 11)


def expected_output(layer: FlexConv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, torch.from_numpy(direct_kernel(layer)).float(), layer.bias, padding=7, groups=8)


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
@pytest.mark.parametrize(
    ("mean", "sigma"),
    [
        ([0.0, 0.0], [0.2, 0.4]),
        ([0.4, -0.7], [0.1, 0.2]),
        ([-1.0, 1.0], [0.3, 0.05]),
        ([0.03, 0.03], [1e-3, 2.0]),
        ([5.0, 0.0], [0.1, 0.1]),
    ],
)
def test_cropped_convolution_equals_that_with_the_whole_kernel(mean, sigma, options, x):
    layer = set_mask_(make(**options), mean, sigma)
    whole = make(**options, threshold=0.0)
    whole.load_state_dict(layer.state_dict())
    expected = whole.to_conv()
    expected.weight.data.mul_(layer.weight != 0)
    for training in (True, False):
        layer.train(training).kernel.look()
        assert layer.kernel.margins not in (None, WIDE)
        torch.testing.assert_close(layer(x), expected(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.to_conv()(x), expected(x), atol=1e-5, rtol=1e-4)


def test_the_convolution_really_shrinks(x):
    layer = FlexConv2d(8, 8, 33)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    convolved = counter.get_flop_counts()["Global"]
    taps = next(value for op, value in convolved.items() if "conv" in str(op)) // (2 * 2 * 8 * 8 * 12 * 11)
    assert layer.kernel.margins == ((12, 12), (12, 12))
    assert taps == 81
    assert layer.receptive_field() == layer.to_conv().kernel_size == (9, 9)
    assert layer.multiply_adds((12, 11)) == 12 * 11 * 8 * 8 * 81
    assert layer.weight.shape == (8, 8, 33, 33)


def test_crops_have_few_sizes():
    layer = FlexConv2d(1, 1, 33).eval()
    sizes = set()
    for sigma in np.linspace(0.01, 1, 300).tolist():
        layer.load_state_dict(set_mask_(layer, [0.0, 0.0], [sigma, sigma]).state_dict())
        size, _ = layer.receptive_field()
        sizes.add(size)
        reach = sigma * math.sqrt(-2 * math.log(0.1)) * 16
        assert min(math.floor(reach), 16) <= size // 2 <= math.floor(reach) + 2
    assert len(sizes) <= 9


def test_the_crop_follows_every_change_of_the_mask(x):
    layer = make().eval()
    changes = [
        lambda: set_mask_(layer, [0.0, 0.0], [0.5, 0.5]),
        lambda: layer.kernel.mask_sigma.data.fill_(0.05),
        lambda: layer.load_state_dict(set_mask_(make(), [0.2, 0.0], [0.3, 0.6]).state_dict()),
        lambda: layer.train(),
        lambda: layer.kernel.mask_mean.data.fill_(-0.5),
        lambda: layer.eval().double().float(),
        lambda: setattr(layer.kernel, "mask_sigma", nn.Parameter(torch.tensor([0.4, 0.1]))),
    ]
    with torch.no_grad():
        for change in changes:
            layer(x)
            change()
            torch.testing.assert_close(layer(x), expected_output(layer, x), atol=1e-4, rtol=1e-4)


def test_training_uses_the_whole_kernel_until_the_mask_was_looked_at(x):
    layer = make()
    steps = [
        (lambda: None, (3, 3)),  # as it was made: sigma 0.125 reaches 1.9 pixels
        (lambda: set_mask_(layer, [0.3, 0.0], [0.2, 0.2]), (15, 15)),
        (lambda: layer.constrain_(), (6, 7)),
        (lambda: layer.kernel.mask_sigma.data.mul_(1.5), (15, 15)),
        (lambda: layer.eval().train(), (9, 9)),
        (lambda: layer.load_state_dict(make().state_dict()), (3, 3)),
    ]
    for step, field in steps:
        step()
        assert layer.receptive_field() == field
        torch.testing.assert_close(layer(x), expected_output(layer, x), atol=1e-4, rtol=1e-4)


def test_layers_that_share_a_mask_follow_it(x):
    model = nn.Sequential(make(), make())
    model.flex_geometry = share_geometry([layer.kernel for layer in model])
    model.flex_geometry["mask_sigma"].data.fill_(0.3)
    for each in (model.eval(), copy.deepcopy(model)):
        assert [layer.kernel.margins for layer in each if isinstance(layer, FlexConv2d)] == [((3, 3), (3, 3))] * 2


def test_on_the_meta_device_the_last_crop_stays():
    layer = set_mask_(make(), [0.0, 0.0], [0.3, 0.2]).eval()
    field = layer.receptive_field()
    assert field != (15, 15)
    assert layer.to("meta").receptive_field() == field
    assert make(device="meta").receptive_field() == (15, 15)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_that_is_not_finite_is_refused_where_it_is_looked_at(value, x):
    layer = make().eval()
    layer.kernel.mask_sigma.data[1] = value
    broken = layer.state_dict()
    for use in (lambda: layer(x), layer.constrain_, layer.to_conv, layer.kernel.look):
        with pytest.raises(ValueError, match="mask: mean .* sigma .* expected finite numbers; go back"):
            use()
    other = make()
    other.load_state_dict(broken)
    other.eval().double().train()  # loading, moving and switching modes leave it to the forward pass
    with pytest.raises(ValueError, match="mask_sigma: 1 of 2 values are NaN or infinite, expected finite numbers"):
        other(x.double())


def test_sigma_zero_gives_finite_gradients(x):
    layer = set_mask_(make(), [0.0, 0.0], [0.0, 0.0])
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# ---- constraints


def test_constraint_keeps_a_pixel_of_the_mask():
    layer = set_mask_(make(kernel_size=33), [-3.0, 0.4], [-0.2, 1e-9])
    layer.constrain_()
    assert layer.kernel.mask_mean.tolist() == pytest.approx([-1, 0.4])
    assert layer.kernel.mask_sigma[0].item() == pytest.approx(0.2)
    assert (layer.weight.detach() != 0).any((0, 1, 2)).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 5, 8, 33])
def test_constraint_keeps_a_pixel_wherever_the_mask_is(dtype, size):
    layer = FlexConv1d(1, 1, size, padding="same", dtype=dtype)
    for pixel in np.arange(0, size - 0.9, 0.5):  # on pixels, and half-way between two
        set_mask_(layer, [2 * pixel / (size - 1) - 1], [0.0])
        layer.constrain_()
        assert layer.weight.any(), f"pixel {pixel}"


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"mask": False}])
def test_without_a_threshold_or_a_mask_there_is_nothing_to_crop(options, x):
    layer = make(**options).eval()
    layer.constrain_()
    assert layer.receptive_field() == (15, 15)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=7, groups=8)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


# ---- graphs


def test_compiled_training_crops_once_constraints_follow_and_exported_graphs_never_do(x):
    graphs = []

    def backend(graph, inputs):
        convolutions = [n for n in graph.graph.nodes if "timm_contconv.conv" in str(n.target)]
        graphs.append([tuple(n.args[1].meta["example_value"].shape[2:]) for n in convolutions])
        return graph

    torch._dynamo.reset()
    layer = make(kernel_size=33)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    compiled(x)
    for sigma in (0.125, 0.126, 0.127, 0.128, 0.25):
        set_mask_(layer, [0.0, 0.0], [sigma, sigma])
        layer.constrain_()
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-4, rtol=1e-4)
    assert graphs == [[(33, 33)], [(9, 9)], [(17, 17)]], "one graph per size of the crop"
    layer.eval()(x)
    layer.train()
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 3, "a crop survives an evaluation"
    exported = torch.export.export(layer, (x,)).module(check_guards=False)
    exported.load_state_dict(set_mask_(layer, [0.0, 0.0], [0.5, 0.5]).state_dict())
    torch.testing.assert_close(exported(x), layer(x), atol=1e-4, rtol=1e-4)


# ---- accelerators


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("training", [True, False])
def test_on_an_accelerator_no_forward_pass_waits(training, x):
    layer, x = make(compile=False).cuda().train(training), x.cuda()
    layer.constrain_()
    fields = []
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for edit in (lambda: None, lambda: layer.kernel.mask_sigma.mul_(1.5)):
                edit()
                layer(x)
                fields.append(layer.receptive_field())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert fields == [(3, 3), (15, 15)]
    layer.eval()
    assert layer.receptive_field() == (5, 5)
