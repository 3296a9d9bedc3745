"""ContinuousConv2d against ResizeRight, the paper's sum written out, and autograd."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from resize_right import interp_methods, resize
from torch import Tensor
from torch.nn import functional as F

from timm_contconv.layers.cc import ContinuousConv2d
from timm_contconv.layers.cc.features_first import features_first
from timm_contconv.layers.cc.grid import distances
from timm_contconv.layers.cc.phases import apply_kernels, interleaved_conv

from .builders import build, images, three_ways, with_kernel

#: one scale for each way of computing, and where it lies close to another
SCALES = {
    "1/2": 0.5, "1/3": Fraction(1, 3), "1": 1, "2": 2, "3/4": 0.75, "5/3 and 1/2": (Fraction(5, 3), 0.5),
    "0.9 and 2": (0.9, 2), "0.61": 0.61, "1.37": 1.37, "root": 0.5**0.5,
}  # fmt: skip


def written_out(layer: ContinuousConv2d, x: Tensor, mode: str = "constant") -> Tensor:
    """Eq. 1 and 2 pixel by pixel, in fractions, for one group; the image is padded by four pixels."""
    scale, support = layer.scale, layer.kernel_size
    outs = [math.ceil(n * s) for n, s in zip(x.shape[2:], scale, strict=True)]
    y = layer.bias.detach().view(1, -1, 1, 1).expand(x.shape[0], -1, *outs).clone()
    padded = F.pad(x, (4,) * 4, mode=mode)

    def neighbours(n: int, dim: int) -> tuple[slice, Tensor]:
        s = scale[dim]
        g = n / s + Fraction(x.shape[2 + dim] - 1, 2) - (outs[dim] - 1) / (2 * s)
        first = math.ceil(g - Fraction(support[dim], 2))
        distance = [float(g - first - j) for j in range(support[dim])]
        return slice(4 + first, 4 + first + support[dim]), torch.tensor(distance, dtype=x.dtype)

    for row in range(outs[0]):
        for column in range(outs[1]):
            (i, dy), (j, dx) = neighbours(row, 0), neighbours(column, 1)
            weight = layer.kernel_at(dy, dx).detach()
            y[:, :, row, column] += torch.einsum("nchw,ochw->no", padded[:, :, i, j], weight)
    return y


# ---- the paper's sum


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("support", [2, (3, 4)])
def test_output_is_the_sum_of_equation_1(scale, support) -> None:
    layer, x = build(scale, support, (2, 3)), images(1, 2, 5, 7)
    torch.testing.assert_close(layer(x), written_out(layer, x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@three_ways
def test_other_borders_are_those_of_a_padded_image(scale: float, mode: str) -> None:
    layer, x = build(scale, padding_mode=mode), images(1, 4, 6, 7)
    torch.testing.assert_close(layer(x), written_out(layer, x, mode))


def test_cubic_kernel_is_resize_right_at_200_random_scales_and_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = with_kernel(interp_methods.cubic, 3, 4)
    ways = set()
    for index in range(200):
        rows, columns = torch.randint(4, 25, (2,), generator=generator).tolist()
        scale = (0.2 + 2.3 * torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
        if index % 4 == 0:  # fractions, of which half the positions lie where neighbours change
            p, q = torch.randint(1, 6, (2, 2), generator=generator).tolist()
            scale = [a / b for a, b in zip(p, q, strict=True)]
        x = images(1, 3, rows, columns)
        expected = resize(x, list(scale), interp_method=interp_methods.cubic, antialiasing=False, pad_mode="constant")
        actual = layer(x, scale)
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() < 1e-4, (scale, x.shape)
        ways.add(min(layer.plan(x.shape[2:], scale).phases, 17))
    assert {1, 17} < ways  # all three ways of computing


@pytest.mark.parametrize("scale", list(SCALES)[:7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ways_of_computing_agree(scale: str, dtype: torch.dtype) -> None:
    layer, x = build(SCALES[scale]).to(dtype), images(2, 4, 9, 14, dtype=dtype)
    plan = layer.plan(x.shape[2:])
    kernels = layer.net(*(distances(axis, 0, axis.numerator) for axis in plan.axes))
    expected = apply_kernels(x, kernels, layer.bias, plan, 1)
    tolerance = 1e-5 * expected.abs().max()
    if plan.phases == 1:
        assert (interleaved_conv(x, kernels, layer.bias, plan, 1) - expected).abs().max() <= tolerance
    for limit in (2**30, 1):
        actual = features_first(x, layer.net.weight, layer.net.features, layer.bias, plan, 1, limit)
        assert (actual - expected).abs().max() <= tolerance


@pytest.mark.parametrize("groups", [2, 4])
@three_ways
def test_groups_are_layers_side_by_side(scale: float, groups: int) -> None:
    layer, x = build(scale, channels=(4, 8), groups=groups), images()
    alone, outputs = build(scale, channels=(4 // groups, 8 // groups)), []
    for group, part in enumerate(x.chunk(groups, 1)):
        own = {name: layer.state_dict()[name].chunk(groups)[group] for name in ("bias", "net.weight")}
        alone.load_state_dict({**layer.state_dict(), **own})
        outputs.append(alone(part))
    torch.testing.assert_close(layer(x), torch.cat(outputs, 1))


@pytest.mark.parametrize("support", [3, 4])
def test_a_centred_image_stays_centred(support: int) -> None:
    """Fig. 6: a plain convolution of even size would move it by half a pixel."""
    x = F.pad(torch.ones(1, 1, 1, 1, dtype=torch.float64), (9,) * 4)
    y = with_kernel(lambda distance: torch.exp(-2 * distance**2), 1, support)(x)
    assert y[0, 0, 9, 9] == y.max() > 0
    torch.testing.assert_close(
        y.flip(2, 3), y, rtol=0, atol=1e-3
    )  # four pixels reach two to one side, one to the other


# ---- scales, sizes and batches


def test_scale_can_be_given_set_or_follow_from_the_size() -> None:
    layer, x = build(0.5), images(1, 4, 20, 30)
    expected = layer(x, (0.6, 0.7))
    assert expected.shape == (1, 6, 12, 21)
    torch.testing.assert_close(layer(x, size=(12, 21)), expected)
    layer.scale = (0.6, 0.7)
    torch.testing.assert_close(layer(x), expected)
    assert layer.scale == (Fraction(3, 5), Fraction(7, 10))
    layer.scale = 0.5
    torch.testing.assert_close(layer(x, scale=0.5, size=(12, 17))[..., 1:11, 1:16], layer(x))  # only moves the grid


@three_ways
def test_a_batch_may_be_missing_or_empty(scale: float) -> None:
    layer, x = build(scale).train(), images()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    empty = x[:0].requires_grad_()
    y = layer(empty)
    y.sum().backward()
    assert y.shape == (0, *layer(x)[0].shape)
    assert empty.grad.shape == empty.shape
    assert not layer.net.weight.grad.any()


# ---- derivatives


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_limit", [2**25, 1])
@three_ways
def test_first_derivatives_are_right(scale: float, memory_limit: int, groups: int) -> None:
    layer = build(scale, groups=groups, memory_limit=memory_limit).train()
    x = images(1, 4, 5, 6, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)
    run = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@three_ways
def test_second_derivatives_are_right(scale: float) -> None:
    layer, x = build(scale, channels=(1, 2)).train(), images(1, 1, 4, 5, requires_grad=True)
    run = lambda x, w: torch.func.functional_call(layer, {"net.weight": w}, (x,)).square()  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x, layer.net.weight), fast_mode=True)


# ---- kept kernels


def test_kernels_are_constructed_once_for_one_use_without_gradients() -> None:
    layer, x, calls = build(0.5), images(1, 4, 12, 12), []
    layer.net.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(3):
            layer(x)
            layer(x[..., :8, :6])
        assert len(calls) == 1
        layer(x, 0.75)
        assert len(calls) == 2
        layer.train()(x)
        layer.train()(x)
    layer.eval()(x)
    assert len(calls) == 5


def test_a_kept_kernel_follows_scale_size_and_settings() -> None:
    layer = build(0.5)
    with torch.no_grad():
        for scale, size in ((None, 12), (None, 13), (0.75, 12), (0.75, 13), (None, 12)):
            x = images(1, 4, size, size)
            torch.testing.assert_close(layer(x, scale), copy.deepcopy(layer).train()(x, scale))
        for name, value in (("padding_mode", "circular"), ("rounding", "floor"), ("scale", 1)):
            setattr(layer, name, value)
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))


# ---- precision and memory formats


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [0.5, 0.75, 0.61, 2])
def test_memory_format_is_kept(scale: float, memory_format: torch.memory_format) -> None:
    x = images().contiguous(memory_format=memory_format)
    assert build(scale)(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@three_ways
def test_half_precision_and_autocast_come_near_float32(scale: float, dtype: torch.dtype) -> None:
    layer, x = ContinuousConv2d(4, 6, 3, scale=scale), torch.randn(2, 4, 12, 13)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        under_autocast = layer(x)
    under_autocast.float().square().mean().backward()
    assert layer.net.weight.grad.dtype == torch.float32
    for y in (under_autocast, layer.to(dtype)(x.to(dtype))):
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.03)


# ---- refused arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale=0: expected a number from 1/256 to 256"),
        ({"scale": float("nan")}, "scale=nan: expected a number from 1/256 to 256"),
        ({"scale": (0.5, 0.5, 0.5)}, r"scale=\(0.5, 0.5, 0.5\): expected a number, or one for each of two"),
        ({"scale": (0.5, -1)}, r"scale\[1\]=-1: expected a number from 1/256"),
        ({"scale": 0.5, "stride": 2}, r"stride=\(2, 2\), scale=0.5: expected one of them"),
        ({"stride": 300}, r"stride=\(300, 300\): expected at most 256"),
        ({"padding": 1}, "padding=1: expected one of same"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror': expected one of zeros, reflect"),
        ({"dilation": 2}, "dilation=2: expected 1"),
        ({"rounding": "up"}, "rounding='up': expected one of ceil, floor, round"),
        ({"hidden": ()}, r"hidden=\(\): .* at least 1"),
        ({"hidden": (8, 0)}, r"hidden.1=0: expected at least 1"),
        ({"hidden": 3}, "hidden=3: "),
        ({"memory_limit": 1.5}, "memory_limit=1.5: expected a positive int"),
        ({"groups": 3}, "in_channels=4: expected a multiple of groups=3"),
        ({"compile": "maybe"}, "compile='maybe'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousConv2d(4, 6, 3, **arguments)


def test_calls_out_of_range_are_named_and_change_nothing() -> None:
    layer, x = build(0.61), images()
    for arguments, message in (
        ({"scale": -1}, "scale=-1"),
        ({"scale": "0.5"}, "scale='0.5': expected a number"),
        ({"size": (0, 3)}, r"size=\(0, 3\): expected a positive int"),
        ({"size": 3.0}, "size=3.0: expected a positive int"),
        ({"size": True}, "size=True: expected a positive int"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, **arguments)
    for wrong in (images(2, 5, 9, 9), images(9, 9)):
        with pytest.raises(ValueError, match=r"x: expected \(N, 4, H, W\) or \(4, H, W\), got"):
            layer(wrong)
    with pytest.raises(ValueError, match="scale='big'"):
        layer.scale = "big"
    assert layer.scale == (Fraction(61, 100),) * 2
