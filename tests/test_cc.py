"""CC layers, against ResizeRight, the paper's sum written out, plain convolutions and autograd."""

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from resize_right import interp_methods, resize
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_contconv.layers import ContinuousConv2d
from timm_contconv.layers.cc import CcSpec
from timm_contconv.layers.cc_grid import Axis, projected_grid
from timm_contconv.layers.cc_net import internal_features, interpolating_net
from timm_contconv.layers.cc_paths import apply_kernels, features_first, interleaved_conv

from .memory import peak_allocation

#: one scale for each way of computing, and where it lies close to another
SCALES = {
    "1/2": 0.5, "1/3": Fraction(1, 3), "1": 1, "2": 2, "3/4": 0.75, "5/3 and 1/2": (Fraction(5, 3), 0.5), "0.61": 0.61,
    "1.37": 1.37, "0.9 and 2": (0.9, 2), "root": 0.5**0.5,
}  # fmt: skip
scales = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
SMALL_SCALES = pytest.mark.parametrize("scale", [0.5, 0.75, 0.61], ids=["strided", "interleaved", "features first"])


def build(scale=0.5, kernel_size=3, channels=(4, 6), **options) -> ContinuousConv2d:
    """A float64 layer with a kernel that is not symmetric, in eval mode."""
    layer = ContinuousConv2d(*channels, kernel_size, scale=scale, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        layer.internal_weight.normal_()
        for value in layer.geometry.values():
            value.add_(torch.randn_like(value), alpha=0.05)
    return layer.eval()


def images(*size: int, **factory) -> Tensor:
    return torch.randn(*(size or (2, 4, 12, 13)), **{"dtype": torch.float64, **factory})


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


# The four steps


def test_projected_grid_of_the_papers_figure_4() -> None:
    down, up = Axis(4, 3, 3, 5, 2), Axis(4, 6, 7, 5, 2)
    torch.testing.assert_close(projected_grid(down), torch.tensor([-1 / 6, 3 / 2, 19 / 6], dtype=torch.float64))
    expected = torch.arange(6, dtype=torch.float64) / 1.4 + 1.5 - 5 / 2.8
    torch.testing.assert_close(projected_grid(up), expected)


def test_a_scale_of_one_half_lies_between_pixels_and_one_third_on_them() -> None:
    assert projected_grid(Axis(6, 3, 1, 2, 2)).tolist() == [0.5, 2.5, 4.5]
    assert projected_grid(Axis(9, 3, 1, 3, 3)).tolist() == [1, 4, 7]


@scales
@pytest.mark.parametrize("support", [2, (3, 4)])
def test_output_is_the_sum_of_equation_1(scale, support) -> None:
    layer, x = build(scale, support, (2, 3)), images(1, 2, 5, 7)
    torch.testing.assert_close(layer(x), written_out(layer, x))


class Cubic(ContinuousConv2d):
    """A layer whose internal net is ResizeRight's cubic kernel."""

    @staticmethod
    def internal_net(rows: Tensor, columns: Tensor, **_: Tensor) -> Tensor:
        kernel = interp_methods.cubic(rows).unsqueeze(1) * interp_methods.cubic(columns)
        return F.pad(kernel.unsqueeze(-1), (0, 1), value=1.0)


def test_cubic_kernel_is_resize_right_at_200_random_scales_and_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Cubic(3, 3, 4, groups=3, bias=False, hidden=(1,), dtype=torch.float64).eval()
    with torch.no_grad():
        layer.internal_weight.copy_(torch.tensor([1.0, 0.0]).expand(3, 1, 2))
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


@pytest.mark.parametrize("scale", [name for name in SCALES if name not in ("0.61", "1.37", "root")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ways_of_computing_agree(scale: str, dtype: torch.dtype) -> None:
    layer, x = build(SCALES[scale]).to(dtype), images(2, 4, 9, 14, dtype=dtype)
    plan = layer.plan(x.shape[2:])
    kernels = layer._kernels(plan)
    expected = apply_kernels(x, kernels, layer.bias, plan, 1)
    tolerance = 1e-5 * expected.abs().max()
    if plan.phases == 1:
        assert (interleaved_conv(x, kernels, layer.bias, plan, 1) - expected).abs().max() <= tolerance
    for limit in (2**30, 1):
        actual = features_first(x, layer.internal_weight, layer.features, layer.bias, plan, 1, limit)
        assert (actual - expected).abs().max() <= tolerance


@pytest.mark.parametrize("groups", [2, 4])
@SMALL_SCALES
def test_groups_are_layers_side_by_side(scale: float, groups: int) -> None:
    layer, x = build(scale, channels=(4, 8), groups=groups), images()
    alone = build(scale, channels=(4 // groups, 8 // groups))
    outputs = []
    for group, part in enumerate(x.chunk(groups, 1)):
        state = {**layer.state_dict(), "bias": layer.bias.chunk(groups)[group]}
        state["internal_weight"] = layer.internal_weight.chunk(groups)[group]
        alone.load_state_dict(state)
        outputs.append(alone(part))
    torch.testing.assert_close(layer(x), torch.cat(outputs, 1))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@SMALL_SCALES
def test_other_borders_are_those_of_a_padded_image(scale: float, mode: str) -> None:
    layer, x = build(scale, padding_mode=mode), images(1, 4, 6, 7)
    torch.testing.assert_close(layer(x), written_out(layer, x, mode))


# Scales and sizes


def test_scale_can_be_given_set_or_follow_from_the_size() -> None:
    layer, x = build(0.5), images(1, 4, 20, 30)
    expected = layer(x, (0.6, 0.7))
    assert expected.shape == (1, 6, 12, 21)
    torch.testing.assert_close(layer(x, size=(12, 21)), expected)
    layer.scale = (0.6, 0.7)
    torch.testing.assert_close(layer(x), expected)
    assert layer.scale == (Fraction(3, 5), Fraction(7, 10))


def test_a_size_beside_the_scale_only_moves_the_grid() -> None:
    layer, x = build(0.5), images(1, 4, 16, 16)
    larger = layer(x, scale=0.5, size=(10, 10))
    torch.testing.assert_close(larger[..., 1:9, 1:9], layer(x))


@pytest.mark.parametrize(("rounding", "size"), [("ceil", 11), ("floor", 10), ("round", 11)])
def test_output_sizes_are_rounded(rounding: str, size: int) -> None:
    layer = build(0.75, rounding=rounding)
    assert layer(images(1, 4, 14, 14)).shape[2:] == (size, size)


def test_one_image_without_a_batch_dimension() -> None:
    layer, x = build(0.61), images(4, 9, 9)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@SMALL_SCALES
def test_a_batch_may_be_empty(scale: float) -> None:
    layer, x = build(scale).train(), images(0, 4, 12, 13).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, *layer(images())[0].shape)
    assert x.grad.shape == x.shape
    assert not layer.internal_weight.grad.any()


class Gaussian(ContinuousConv2d):
    """A layer whose internal net is a Gaussian, half a pixel wide."""

    @staticmethod
    def internal_net(rows: Tensor, columns: Tensor, **_: Tensor) -> Tensor:
        kernel = torch.exp(-2 * (rows.unsqueeze(1) ** 2 + columns**2))
        return F.pad(kernel.unsqueeze(-1), (0, 1), value=1.0)


@pytest.mark.parametrize(("support", "moved"), [(3, 0), (4, 5)])
def test_stays_centred_where_a_plain_convolution_of_even_size_moves(support: int, moved: int) -> None:
    """Fig. 6: a Gaussian, applied ten times to a pixel in the middle of an image."""
    layer = Gaussian(1, 1, support, scale=1, bias=False, hidden=(1,), dtype=torch.float64).eval()
    with torch.no_grad():
        layer.internal_weight.copy_(torch.tensor([[[1.0, 0.0]]]))
    plain = torch.exp(-2 * (torch.arange(support).double() - (support - 1) / 2) ** 2)
    plain = (plain.unsqueeze(1) * plain).view(1, 1, support, support)
    x = y = F.pad(torch.ones(1, 1, 1, 1, dtype=torch.float64), (20,) * 4)
    for _ in range(10):
        x, y = layer(x), F.conv2d(F.pad(y, (support // 2, (support - 1) // 2) * 2), plain)
    assert centre_of_mass(x) == pytest.approx((20, 20), abs=0.01)
    assert centre_of_mass(y) == pytest.approx((20 + moved, 20 + moved))


def centre_of_mass(image: Tensor) -> tuple[float, float]:
    mass = image.detach()[0, 0] / image.detach().sum()
    pixels = torch.arange(mass.shape[0], dtype=mass.dtype)
    return float(mass.sum(1) @ pixels), float(mass.sum(0) @ pixels)


# Plain convolutions

STRIDED = {
    "3x3/2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1x1/2": {"kernel_size": 1, "stride": 2},
    "7x7/2": {"kernel_size": 7, "stride": 2, "padding": 3},
    "5x5/2": {"kernel_size": 5, "stride": 2, "padding": 2},
    "2x2/2": {"kernel_size": 2, "stride": 2},
    "4x4/2": {"kernel_size": 4, "stride": 2, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x5/2x1": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    "depthwise": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
    "circular": {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
    "same": {"kernel_size": 3, "stride": 2, "same": True},
}
strided = pytest.mark.parametrize("name", STRIDED)


def plain(name: str, **options) -> nn.Conv2d:
    settings = {**STRIDED[name], **options}
    return (Conv2dSame if settings.pop("same", False) else nn.Conv2d)(4, 8, **settings).eval()


@strided
def test_fit_reproduces_a_strided_convolution_at_even_and_odd_sizes(name: str) -> None:
    conv = plain(name)
    layer = ContinuousConv2d.from_conv(conv, CcSpec()).eval()
    assert layer.fit_error(conv) < 1e-6
    for size in ((16, 20), (15, 21), (17, 18)):
        x = torch.randn(2, 4, *size)
        expected = conv(x)
        assert layer(x).shape == expected.shape
        assert (layer(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(4, 4, 0), (7, 4, 3), (3, 3, 1), (1, 3, 0), (9, 8, 4)])
def test_fit_reproduces_larger_strides_at_their_multiples(kernel_size: int, stride: int, padding: int) -> None:
    conv = nn.Conv2d(3, 5, kernel_size, stride, padding)
    layer, x = ContinuousConv2d.from_conv(conv, CcSpec()).eval(), torch.randn(1, 3, 4 * stride, 5 * stride)
    assert (layer(x) - conv(x)).norm() <= 1e-5 * conv(x).norm()


def test_support_is_the_kernels_where_that_holds_the_pixels_and_no_larger_otherwise() -> None:
    sizes = {name: ContinuousConv2d.from_conv(plain(name), CcSpec()).kernel_size for name in ("3x3/2", "7x7/2", "same")}
    assert sizes == {"3x3/2": (3, 3), "7x7/2": (7, 7), "same": (4, 4)}
    patches = nn.Conv2d(3, 5, 7, 4, 3)
    assert ContinuousConv2d.from_conv(patches, CcSpec()).kernel_size == (9, 9)
    narrow = ContinuousConv2d.from_conv(patches, CcSpec(kernel_size=7))
    missed = patches.weight.detach().clone()
    missed[:, :, 1:, 1:] = 0  # the first row and column lie outside
    assert narrow.fit_error(patches) == pytest.approx(float(missed.norm() / patches.weight.detach().norm()), rel=1e-5)


def test_too_few_features_give_the_least_error_and_say_so() -> None:
    conv, reports = plain("3x3/2"), {}
    for width in (2, 5, 100):
        torch.manual_seed(0)
        layer = ContinuousConv2d.from_conv(conv, CcSpec(hidden=(width,)))
        reports[width] = layer.fit_error(conv)
        phi = layer.features(torch.tensor([1.5, 0.5, -0.5]), torch.tensor([1.5, 0.5, -0.5])).flatten(0, 1)
        kernel = (layer.internal_weight @ phi.T).view(8, 4, 3, 3)
        error = (kernel - conv.weight).norm() / conv.weight.norm()
        assert reports[width] == pytest.approx(float(error.detach()), rel=1e-3, abs=1e-6)
    assert reports[2] > reports[5] > reports[100]
    assert reports[100] < 1e-4


def test_fit_draws_nothing_and_random_does() -> None:
    conv = plain("3x3/2")
    one, two = (ContinuousConv2d.from_conv(conv, CcSpec(), init) for init in ("fit", "fit"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert ContinuousConv2d.from_conv(conv, CcSpec(), "random").fit_error(conv) > 0.5
    with pytest.raises(ValueError, match="meta device"):
        ContinuousConv2d.from_conv(copy.deepcopy(conv).to("meta"), CcSpec())


@strided
def test_merged_convolution_has_the_same_output(name: str) -> None:
    layer = ContinuousConv2d.from_conv(plain(name), CcSpec(), "random").eval()
    x = torch.randn(2, 4, 16, 20)
    merged = layer.to_conv()
    assert type(merged) in (nn.Conv2d, Conv2dSame)
    torch.testing.assert_close(merged(x), layer(x))
    assert merged(x[..., 1:, 1:]).shape == layer(x[..., 1:, 1:]).shape


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("rounding", ["ceil", "floor", "round"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("support", range(1, 9))
def test_kernels_of_every_size_have_a_plain_convolution(
    support: int, stride: int, rounding: str, padding_mode: str
) -> None:
    layer = build(Fraction(1, stride), (support, 3), rounding=rounding, padding_mode=padding_mode)
    x = images(1, 4, 4 * stride, 3 * stride)
    torch.testing.assert_close(layer.to_conv()(x), layer(x))


@strided
def test_the_replaced_convolution_gets_its_kernel_back(name: str) -> None:
    conv = plain(name)
    layer = ContinuousConv2d.from_conv(conv, CcSpec())
    back = layer.to_conv_like(copy.deepcopy(conv).to("meta"))
    torch.testing.assert_close(back.weight, conv.weight)
    assert (type(back), back.stride, back.padding) == (type(conv), conv.stride, conv.padding)


def test_weight_is_the_kernel_of_the_convolution() -> None:
    layer, x = build(0.5, 4), images(2, 4, 12, 14)
    torch.testing.assert_close(F.conv2d(x, layer.weight, layer.bias, 2, 1), layer(x))
    offsets = torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=torch.float64)
    torch.testing.assert_close(layer.weight, layer.kernel_at(offsets, offsets))


def test_other_scales_have_no_plain_convolution() -> None:
    with pytest.raises(ValueError, match="scale=61/100: expected 1/k"):
        build(0.61).to_conv()
    layer = ContinuousConv2d.from_conv(plain("3x3/2"), CcSpec())
    layer.scale = 1
    with pytest.raises(ValueError, match=r"scale=1: expected 1/stride, stride \(2, 2\)"):
        layer.to_conv_like(plain("3x3/2"))


# The internal net


def test_it_starts_as_linear_interpolation_of_a_kernel() -> None:
    layer = ContinuousConv2d(2, 3, (3, 4), scale=0.7, dtype=torch.float64)
    pixels = layer.internal_weight[..., :-1].unflatten(2, (3, 4)).detach()
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
    kernel = layer.weight if hidden is None else layer.kernel_at(*(3 * torch.rand(40) - 1.5 for _ in range(2)))
    variance = float(kernel.detach().square().mean())
    assert variance == pytest.approx(float(nn.Conv2d(64, 64, 3).weight.detach().square().mean()), rel=0.15)


def test_parameters_are_the_layers_of_the_net() -> None:
    layer = ContinuousConv2d(4, 6, 3, hidden=(16, 8), groups=2)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "internal_weight": (6, 2, 9), "bias": (6,),
        "geometry.weight_1": (16, 2), "geometry.bias_1": (16,), "geometry.weight_2": (8, 16), "geometry.bias_2": (8,),
    }  # fmt: skip


# Derivatives and memory


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_limit", [2**25, 1])
@SMALL_SCALES
def test_first_derivatives_are_right(scale: float, memory_limit: int, groups: int) -> None:
    layer = build(scale, groups=groups, memory_limit=memory_limit).train()
    x = images(1, 4, 5, 6, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)
    run = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@SMALL_SCALES
def test_second_derivatives_are_right(scale: float) -> None:
    layer, x = build(scale, channels=(1, 2)).train(), images(1, 1, 4, 5, requires_grad=True)
    run = lambda x, w: torch.func.functional_call(layer, {"internal_weight": w}, (x,)).square()  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x, layer.internal_weight), fast_mode=True)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor)]
        self.numbers = max([self.numbers, *(value.numel() for value in tensors)])
        return result


@SMALL_SCALES
def test_no_tensor_is_as_large_as_the_weights_of_all_pixels(scale: float) -> None:
    layer, x = build(scale, 4, channels=(32, 32)).train(), images(1, 32, 40, 40)
    with Largest() as largest:
        y = layer(x)
        y.sum().backward()
    assert largest.numbers < layer.in_channels * layer.out_channels * 16 * y[0, 0].numel() / 20


def saved_bytes(layer: ContinuousConv2d, x: Tensor) -> int:
    sizes = {}
    own = {value.untyped_storage().data_ptr() for value in (x, *layer.parameters())}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = layer(x)
    del y
    return sum(sizes.values())


def test_a_limit_keeps_little_more_than_the_image_for_the_backward_pass() -> None:
    layer, x = build(0.61, channels=(16, 16), memory_limit=2**30).train(), images(2, 16, 60, 60)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.internal_weight)
    unlimited = saved_bytes(layer, x)
    layer.memory_limit = 500_000
    assert saved_bytes(layer, x) <= min(500_000 + 2 * x.nbytes, unlimited / 5)
    actual = torch.autograd.grad(layer(x).square().sum(), layer.internal_weight)
    torch.testing.assert_close(actual, expected)


def test_a_limit_holds_for_a_batch_of_any_size() -> None:
    layer, x = build(0.61, channels=(16, 16), memory_limit=2**20), images(64, 16, 40, 40)
    with torch.no_grad():
        expected = layer(x[5:6]), layer(x[63:])
        peak = peak_allocation(lambda: layer(x))
        y = layer(x)
    torch.testing.assert_close((y[5:6], y[63:]), expected)
    assert peak <= 2 * y.nbytes + 2 * 2**20


# Kept kernels


def change(layer: ContinuousConv2d, how: str) -> None:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.1)
    if how == "load_state_dict":
        layer.load_state_dict(other.state_dict())
    elif how == "assign":
        layer.load_state_dict(other.state_dict(), assign=True)
    elif how == "step":
        layer.internal_weight.grad = torch.ones_like(layer.internal_weight)
        torch.optim.SGD(layer.parameters(), 0.1).step()
    elif how == "ema":
        torch._foreach_lerp_([v.detach() for v in layer.parameters()], list(other.parameters()), 0.5)
    elif how == "data":
        layer.internal_weight.data[1, 2] += 0.01
    elif how == "hidden data":
        layer.geometry["bias_2"].data[1] += 0.01
    elif how == "new data":
        layer.internal_weight.data = other.internal_weight.data
    elif how == "swap":
        layer.internal_weight.data[:2] = layer.internal_weight.data[:2].flip(0)
    else:
        layer.to(torch.float32).to(torch.float64)


@pytest.mark.parametrize(
    "how", ["load_state_dict", "assign", "step", "ema", "data", "hidden data", "new data", "swap", "to"]
)
@pytest.mark.parametrize("scale", [0.5, 0.75])
def test_a_kept_kernel_is_never_stale(scale: float, how: str) -> None:
    layer, x = build(scale), images()
    with torch.no_grad():
        before = layer(x)
        assert layer(x) is not before
        assert torch.equal(layer(x), before)
        change(layer, how)
        after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, copy.deepcopy(layer)(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", ["contiguous", "in the middle of a buffer", "transposed"])
def test_a_large_kept_kernel_follows_every_number(dtype: torch.dtype, at: str) -> None:
    layer, x = build(0.5, channels=(31, 31)).to(dtype), images(1, 31, 8, 8).to(dtype)
    weight = layer.internal_weight
    if at == "in the middle of a buffer":
        buffer = torch.zeros(weight.numel() + 3, dtype=dtype)
        buffer[3:] = weight.detach().flatten()
        weight.data = buffer[3:].view_as(weight)
    elif at == "transposed":
        weight.data = weight.data.mT.contiguous().mT
    with torch.no_grad():
        before = layer(x)
        for number in (0, 5003, weight.numel() - 1):
            index = torch.unravel_index(torch.tensor(number), weight.shape)
            weight.data[index] += 1
            after = layer(x)
            assert not torch.equal(after, before)
            before = after


def test_a_kept_kernel_follows_scale_and_size() -> None:
    layer = build(0.5)
    with torch.no_grad():
        for scale, size in ((0.5, 12), (0.5, 13), (0.75, 12), (0.75, 13), (0.5, 12)):
            x = images(1, 4, size, size)
            torch.testing.assert_close(layer(x, scale), copy.deepcopy(layer).train()(x, scale))


def test_the_same_kernel_is_used_again() -> None:
    layer = build(0.5)
    with torch.no_grad():
        layer(images())
        assert layer.weight.data_ptr() == layer.weight.data_ptr() == layer._kernels(layer.plan((12, 12))).data_ptr()


def test_kept_kernels_follow_the_settings_of_the_layer() -> None:
    layer, x = build(0.5), images(1, 4, 11, 13)
    with torch.no_grad():
        for name, value in (("padding_mode", "circular"), ("rounding", "floor"), ("scale", 1)):
            before = layer(x)
            setattr(layer, name, value)
            after = layer(x)
            assert after.shape != before.shape or not torch.equal(after, before)
            assert torch.equal(after, copy.deepcopy(layer)(x))


@pytest.mark.parametrize("scale", [0.5, 0.75])
def test_an_edit_of_a_kept_kernel_does_not_stay(scale: float) -> None:
    layer, x = build(scale), images()
    with torch.no_grad():
        before = layer(x)
        layer._kernels(layer.plan(x.shape[2:])).zero_()
        assert torch.equal(layer(x), before)


@SMALL_SCALES
def test_gradients_of_images_after_inference_mode(scale: float) -> None:
    layer, x = build(scale).requires_grad_(False), images()
    with torch.inference_mode():
        expected = layer(x)
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, expected.clone())
    assert torch.autograd.grad(y.sum(), x)[0].any()


# What PyTorch does with modules


@SMALL_SCALES
def test_copies_pickles_traces_and_exports_agree(scale: float) -> None:
    layer, x = build(scale, groups=2), images()
    expected = layer(x)
    copies = {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "fx": torch.fx.symbolic_trace(layer),
        "export": torch.export.export(layer, (x,)).module(),
    }
    for how, other in copies.items():
        torch.testing.assert_close(other(x), expected, msg=lambda text, how=how: f"{how}: {text}")


class Resizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = build(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x, 0.61), self.layer(x, size=(5, 7)), self.layer(x[0], scale=2, size=9), self.layer(x[1])


def test_calls_with_scales_and_sizes_can_be_traced() -> None:
    model, x = Resizing(), images()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@SMALL_SCALES
def test_exported_with_sizes_that_change(scale: float) -> None:
    layer, sizes = build(scale), dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(layer, (images(2, 4, 24, 24),), dynamic_shapes=(sizes,)).module()
    x = images(3, 4, 30, 22)
    torch.testing.assert_close(exported(x), layer(x))


def test_compiled_for_output_sizes_that_change() -> None:
    torch._dynamo.reset()
    layer = build(0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = images()
    for size in ((4, 5), (7, 8), (9, 3)):
        torch.testing.assert_close(compiled(x, size=size), layer(x, size=size))


@pytest.mark.parametrize(("scale", "memory_limit"), [(0.5, None), (0.75, None), (0.61, None), (0.61, 1)], ids=str)
def test_compiled_in_one_graph_with_the_same_gradients(scale: float, memory_limit: int | None) -> None:
    torch._dynamo.reset()
    layer, x = build(scale, memory_limit=memory_limit).train(), images(1, 4, 4, 5, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("scale", [0.5, 0.61], ids=["strided", "features first"])
def test_one_compiled_graph_serves_images_of_any_size(scale: float) -> None:
    torch._dynamo.reset()
    layer = build(scale)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((9, 12), (14, 20)):
        x = images(1, 4, *size)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow
def test_construction_compiles() -> None:
    layer, x = build(0.75, compile=True), images()
    expected = build(0.75)
    expected.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), expected(x))


def test_built_on_meta_and_materialised() -> None:
    layer = ContinuousConv2d(4, 6, 3, scale=0.61, device="meta")
    assert layer(torch.empty(2, 4, 10, 10, device="meta")).shape == (2, 6, 7, 7)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.geometry["weight_3"], ContinuousConv2d(4, 6, 3, scale=0.61).geometry["weight_3"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [0.5, 0.75, 0.61, 2])
def test_memory_format_is_kept(scale: float, memory_format: torch.memory_format) -> None:
    x = images().contiguous(memory_format=memory_format)
    assert build(scale)(x).is_contiguous(memory_format=memory_format)


@SMALL_SCALES
def test_autocast_computes_in_bfloat16_with_kernels_in_float32(scale: float) -> None:
    layer, x = build(scale).float().train(), images().float()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02 * float(exact.detach().abs().max()))
    y.float().square().mean().backward()
    assert layer.internal_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@SMALL_SCALES
def test_half_precision_parameters(scale: float, dtype: torch.dtype) -> None:
    layer, x = ContinuousConv2d(4, 6, 3, scale=scale), torch.randn(2, 4, 12, 13)
    expected = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.03)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale=0: expected a number from 1/256 to 256"),
        ({"scale": float("nan")}, "scale=nan: expected a number from 1/256 to 256"),
        ({"scale": (0.5, 0.5, 0.5)}, r"scale=\(0.5, 0.5, 0.5\): expected a number, or one for each of two"),
        ({"scale": 0.5, "stride": 2}, "stride=2, scale=0.5: expected one of them"),
        ({"padding": 1}, "padding=1: expected 'same'"),
        ({"dilation": 2}, "dilation=2: expected 1"),
        ({"rounding": "up"}, "rounding='up': expected 'ceil', 'floor' or 'round'"),
        ({"hidden": ()}, r"hidden=\(\): expected ints from 1 to 1024"),
        ({"hidden": (8, 0)}, r"hidden=\(8, 0\): expected ints"),
        ({"hidden": 3}, "hidden=3: expected ints"),
        ({"memory_limit": 0}, "memory_limit=0: expected a positive number of bytes"),
        ({"memory_limit": 1.5}, "memory_limit=1.5: expected a positive number of bytes"),
        ({"stride": 300}, "stride=300: expected at most 256"),
        ({"scale": (0.5, -1)}, r"scale\[1\]=-1: expected a number from 1/256"),
        ({"groups": 3}, "in_channels=4: expected a multiple of groups=3"),
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 40}, "less than or equal to 31"),
        ({"hidden": (5000,)}, "less than or equal to 1024"),
        ({"scale": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_recipes_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CcSpec(**settings)


def test_convolutions_with_outputs_of_other_sizes_are_refused() -> None:
    assert "its output has neither ceil nor floor" in CcSpec().refusal(nn.Conv2d(3, 4, 3, 2))
    assert CcSpec().refusal(nn.Conv1d(4, 4, 3, 2)) == "cc has no 1-D layer"
    assert "dilation" in CcSpec().refusal(nn.Conv2d(4, 4, 3, 2, 2, dilation=2))
