"""`ops.conv` by every algorithm against PyTorch's convolution in float64: values, layouts, dtypes, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from timm_contconv import ops

from .reference import CPU_ALGORITHMS, PLAIN, check, plain, reference, run, using


def operators(fn) -> set[str]:
    """Names of the convolution operators that a call runs."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return {str(op) for op in counter.get_flop_counts()["Global"]}


@st.composite
def cases(draw, dims: int, most_size: int, most_kernel: int, depthwise: bool):
    """x, weight, bias, stride, padding and groups of any shape for which a convolution exists."""
    ints = lambda low, high: draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))  # noqa: E731
    size, kernel, stride = ints(1, most_size), ints(1, most_kernel), ints(1, 3)
    padding = ints(0, most_kernel // 2 + 2)
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    batch = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([2, 3, 16, 17, 33] if depthwise else [1, 1, 2, 3]))
    c_in, c_out = (1, 1) if depthwise else (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    channels = groups * c_in
    x = torch.randn(batch, channels, *size, generator=generator)
    if dims == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    if draw(st.booleans()):
        x = torch.cat([x, x], 1)[:, 1 : channels + 1]
    weight = torch.randn(groups * c_out, c_in, *kernel, generator=generator)
    bias = torch.randn(groups * c_out, generator=generator) if draw(st.booleans()) else None
    return x, weight, bias, tuple(stride), tuple(padding), groups


def check_all(case) -> None:
    done = {name for name in ["default", *ops.algorithms()] if check(name, case)}
    assert {"default", "pytorch", "fft"} <= done


@given(cases(2, 20, 23, depthwise=True))
@settings(max_examples=60, deadline=None)
def test_depthwise_in_2d(case):
    check_all(case)


@given(cases(2, 14, 11, depthwise=False))
@settings(max_examples=100, deadline=None)
def test_dense_in_2d(case):
    check_all(case)


@given(st.one_of(cases(1, 70, 90, depthwise=True), cases(1, 40, 50, depthwise=False)))
@settings(max_examples=60, deadline=None)
def test_in_1d(case):
    check_all(case)


@given(st.one_of(cases(3, 7, 8, depthwise=True), cases(3, 6, 6, depthwise=False)))
@settings(max_examples=40, deadline=None)
def test_in_3d(case):
    check_all(case)


@st.composite
def small_kernels(draw):
    """Depthwise, stride 1, on images whose rows fill vectors: compiled loops of their own."""
    kernel, size = (draw(st.tuples(st.sampled_from(s), st.sampled_from(t))) for s, t in (([3, 5, 7],) * 2, SIZES))
    padding = draw(st.tuples(st.integers(0, 8), st.integers(0, 8)))
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    channels, dtype = draw(st.sampled_from([2, 16, 17])), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shapes = (2, channels, *size), (channels, 1, *kernel), (channels,)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return *tensors, (1, 1), padding, channels


SIZES = [1, 2, 6, 7, 8, 13], [7, 10, 14, 16, 17, 28, 33, 40, 64]


@given(small_kernels())
@settings(max_examples=60, deadline=None)
def test_small_depthwise_kernels(case):
    assert check("direct", case, 1e-5 if case[0].dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("name", ["default", "channels_last", "direct", "fft"])
@pytest.mark.parametrize(("channels", "size"), [(48, 28), (96, 14), (192, 7)])
def test_depthwise_shapes_of_convnext(name, channels, size):
    x, weight = torch.randn(1, channels, size, size), torch.randn(channels, 1, 23, 23)
    assert check(name, (x, weight, None, (1, 1), (11, 11), channels))


def small_case(groups: int = 48):
    x, weight = torch.randn(2, 48, 12, 11), torch.randn(48, 48 // groups, 9, 6)
    return x, weight, torch.randn(48), (1, 1), (4, 2), groups


@pytest.mark.parametrize("groups", [1, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
def test_half_precision_is_within_its_rounding(name, dtype, groups):
    x, weight, bias, *geometry = small_case(groups)
    check(name, (x.to(dtype), weight.to(dtype), bias.to(dtype), *geometry), torch.finfo(dtype).eps)


@pytest.mark.parametrize("groups", [1, 48])
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e15])
@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
def test_very_large_and_very_small_numbers(name, size, groups):
    x, weight, bias, *geometry = small_case(groups)
    check(name, (x * size, weight, bias * size, *geometry))
    check(name, (x, weight * size, bias * size, *geometry))


@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
def test_subnormal_kernels_give_no_nan_and_no_error_beyond_their_size(name):
    x, weight, _, *geometry = small_case()
    weight[:, :, ::2] = 1e-39
    check(name, (x, weight, None, *geometry))


@pytest.mark.parametrize("groups", [1, 48])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
def test_a_nan_or_inf_reaches_what_it_must_and_no_other_image(name, value, groups):
    x, weight, bias, *geometry = small_case(groups)
    x[0, 1, 3, 5] = value
    with using(name):
        try:
            got = run(ops.conv, x, weight, bias, *geometry)
        except ValueError:
            return
    expected = run(plain, x, weight, bias, *geometry)
    for a, b in zip(got[:2], expected, strict=False):
        assert not (a[0].isfinite() & ~b[0].isfinite()).any()
        assert a[1].isfinite().all()
    assert not (got[2].isfinite() & ~expected[2].isfinite()).any()


@pytest.mark.parametrize("groups", [1, 24])
def test_anomaly_detection_is_not_misled_by_transforms(groups):
    """The pixels that the NaN does not meet stay numbers."""
    x, weight = torch.randn(2, 24, 32, 32), torch.randn(24, 24 // groups, 17, 17)
    x[0, :, 0, 0] = math.nan
    with torch.autograd.detect_anomaly(check_nan=False):
        out = ops.conv(x, weight, None, (1, 1), (8, 8), groups)
    assert out[0, :, 20:, 20:].isfinite().all()


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding", [0, 4])
def test_results_have_the_layout_of_the_images(name, form, padding, groups):
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=form).requires_grad_()
    weight = torch.randn(16, 16 // groups, 9, 9)
    try:
        with using(name):
            out = ops.conv(x, weight, None, (1, 1), (padding, padding), groups)
            grad = torch.randn_like(out).contiguous()
            (to_x,) = torch.autograd.grad(out, x, grad)
    except ValueError:
        return
    assert out.is_contiguous(memory_format=form)
    assert to_x.is_contiguous(memory_format=form)


def test_one_image_without_a_batch():
    x, weight = torch.randn(4, 9, 9), torch.randn(4, 1, 9, 9)
    torch.testing.assert_close(ops.conv(x, weight, None, (1, 1), (4, 4), 4), F.conv2d(x, weight, None, 1, 4, 1, 4))


@pytest.mark.parametrize("name", ["default", "direct", "fft"])
def test_a_gradient_that_is_not_needed_is_not_computed(name):
    x, weight = torch.randn(1, 16, 14, 14), torch.randn(16, 1, 13, 13, requires_grad=True)
    with using(name):
        names = operators(lambda: ops.conv(x, weight, None, (1, 1), (6, 6), 16).sum().backward())
    assert not any("input_gradient" in n for n in names), names
    assert x.grad is None


@pytest.mark.parametrize("kernel", [3, 7, 13])
def test_a_bias_alone_gets_its_gradient(kernel):
    x, weight, bias = torch.randn(2, 32, 28, 28), torch.randn(32, 1, kernel, kernel), torch.zeros(32).requires_grad_()
    ops.conv(x, weight, bias, (1, 1), (kernel // 2,) * 2, 32).sum().backward()
    assert torch.equal(bias.grad, torch.full((32,), 2 * 28 * 28.0))


@torch.no_grad()
def test_inference_with_images_of_one_shape_and_many_strides():
    weight, bias = torch.randn(32, 1, 13, 13), torch.randn(32)
    wide = torch.randn(2, 40, 30, 33)
    views = [
        torch.randn(2, 32, 28, 30),
        torch.randn(2, 32, 28, 30).contiguous(memory_format=torch.channels_last),
        wide[:, 4:36, 1:29, 2:32],
        torch.randn(2, 32, 30, 28).transpose(2, 3),
        torch.randn(1, 32, 28, 30).expand(2, -1, -1, -1),
    ]
    for x in [*views, *reversed(views)]:
        y, expected = ops.conv(x, weight, bias, (1, 1), (6, 6), 32), F.conv2d(x, weight, bias, 1, 6, 1, 32)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last if x is views[1] else torch.contiguous_format)


def test_an_image_that_only_a_frozen_weight_would_read_is_not_kept():
    x = torch.randn(1, 64, 28, 28, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with hooks, ops.algorithm("direct"):
        ops.conv(x, torch.randn(64, 1, 9, 9), None, (1, 1), (4, 4), 64)
    assert torch.Size([1, 64, 28, 28]) not in kept


@pytest.mark.parametrize(("channels", "groups"), [(3, 3), (4, 1)])
def test_kernels_of_16000_taps(channels, groups):
    """Without transforms these would be billions of multiply-adds."""
    x, weight = torch.randn(1, channels, 31999), torch.randn(channels, channels // groups, 16000)
    out = ops.conv(x, weight, None, (1,), (0,), groups)
    for t in (0, 777, 15999):
        window = x[0, :, t : t + 16000].double()
        expected = (window[:, None] * weight.double()).sum(-1)[:, 0] if groups > 1 else None
        expected = torch.einsum("ik,oik->o", window, weight.double()) if expected is None else expected
        torch.testing.assert_close(out[0, :, t].double(), expected, rtol=1e-4, atol=1e-2)


def test_a_small_convolution_is_plain_pytorch():
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 1, 3, 3)
    assert operators(lambda: ops.conv(x, weight, None, (1, 1), (1, 1), 8)) == {"aten.convolution"}


@pytest.mark.parametrize(("groups", "kernel"), [(64, 23), (1, 33)])
def test_a_large_convolution_is_not(groups, kernel):
    x, weight = torch.randn(2, 64, 28, 28), torch.randn(64, 64 // groups, kernel, kernel)
    names = operators(lambda: ops.conv(x, weight, None, (1, 1), (kernel // 2,) * 2, groups))
    assert names == {"timm_contconv.conv"}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_with_small_kernels_are_pytorchs(groups, dims):
    x, weight = torch.randn(2, 4, *[6] * dims), torch.randn(8, 4 // groups, *[3] * dims)
    expected = PLAIN[dims](x, weight, None, 2, 1, 1, groups)
    assert torch.equal(ops.conv(x, weight, None, (2,) * dims, (1,) * dims, groups), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "groups"), [(3, 48), (13, 48), (13, 1)])
def test_autocast_casts_as_a_convolution_does(dtype, kernel, groups):
    x = torch.randn(1, 48, 28, 28, requires_grad=True)
    weight = torch.randn(48, 48 // groups, kernel, kernel, requires_grad=True)
    bias = torch.randn(48).to(dtype)
    with torch.autocast("cpu", dtype):
        out = ops.conv(x, weight, bias, (1, 1), (kernel // 2,) * 2, groups)
        expected = F.conv2d(x, weight, bias, 1, kernel // 2, 1, groups)
    out.float().sum().backward()
    assert out.dtype == expected.dtype == dtype
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    scale = expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)


def test_autocast_leaves_float64():
    x, weight = torch.randn(1, 4, 9, 9).double(), torch.randn(4, 1, 9, 9).double()
    with torch.autocast("cpu", torch.bfloat16), ops.algorithm("fft"):
        assert ops.conv(x, weight, None, (1, 1), (4, 4), 4).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("channels", "kernel"),
    [(2, (32,)), (4, (16,)), (6, (16,)), (8, (8,)), (8, (12,)), (14, (16,)), (4, (64,)), (8, (8, 8))],
)
def test_half_precision_where_onednn_errs(channels: int, kernel: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(2, channels, *[40] * len(kernel))
    weight, bias = torch.randn(6, channels, *kernel) / math.prod(kernel) ** 0.5, torch.randn(6)
    geometry = (1,) * len(kernel), tuple(k // 2 for k in kernel), 1
    expected = plain(x.double(), weight.double(), bias.double(), *geometry).float()
    actual = ops.conv(x.to(dtype), weight.to(dtype), bias.to(dtype), *geometry)
    assert actual.dtype == dtype
    assert (actual - expected).norm() < 0.02 * expected.norm()
    with torch.autocast("cpu", dtype):
        assert (ops.conv(x, weight, bias, *geometry) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_no_real_floating_point_number_is_pytorchs(dtype, groups):
    x, weight = torch.randint(-5, 5, (1, 4, 20, 20)), torch.randint(-5, 5, (4, 4 // groups, 9, 9))
    x, weight = (t.to(dtype) * (1 + 2j) if dtype.is_complex else t.to(dtype) for t in (x, weight))
    with ops.algorithm("fft"):
        got = ops.conv(x, weight, None, (1, 1), (4, 4), groups)
    assert torch.equal(got, F.conv2d(x, weight, None, 1, 4, 1, groups))


@pytest.mark.parametrize("name", ["default", "fft"])
def test_an_empty_batch(name):
    weight = torch.randn(4, 1, 9, 9, requires_grad=True)
    with using(name):
        out = ops.conv(torch.randn(0, 4, 9, 9), weight, None, (1, 1), (4, 4), 4)
    out.sum().backward()
    assert out.shape == (0, 4, 9, 9)
    assert weight.grad.abs().sum() == 0


X, WEIGHT, DEPTHWISE = torch.zeros(8, 24, 32, 32), torch.zeros(24, 24, 9, 9), torch.zeros(24, 1, 9, 9)


@pytest.mark.parametrize("name", ["default", "fft"])
@pytest.mark.parametrize(
    ("x", "weight", "bias", "stride", "padding", "groups"),
    [
        (X, WEIGHT.double(), None, (1, 1), (4, 4), 1),
        (X, WEIGHT.to("meta"), None, (1, 1), (4, 4), 1),
        (X, WEIGHT, torch.zeros(24).double(), (1, 1), (4, 4), 1),
        (X, WEIGHT, torch.zeros(1), (1, 1), (4, 4), 1),
        (X, WEIGHT[:1], torch.zeros(5), (1, 1), (4, 4), 1),
        (X, WEIGHT, None, (1, 1), (-1, -1), 1),
        (X, WEIGHT, None, (0, 1), (4, 4), 1),
        (X, WEIGHT[:0], None, (1, 1), (4, 4), 1),
        (X, WEIGHT[:, :12], None, (1, 1), (4, 4), 1),
        (X, DEPTHWISE[:3], None, (1, 1), (4, 4), 24),
        (X[..., :4], DEPTHWISE, None, (1, 1), (0, 0), 24),
        (X[..., :0], DEPTHWISE, None, (1, 1), (9, 9), 24),
        (X[..., :0], WEIGHT, None, (1, 1), (9, 9), 1),
        (X[:0, :, :0], WEIGHT, None, (1, 1), (9, 9), 1),
    ],
)
def test_arguments_that_do_not_fit_are_pytorchs_to_refuse(name, x, weight, bias, stride, padding, groups):
    def outcome(convolution, *arguments):
        try:
            return convolution(x, weight, bias, stride, padding, *arguments).shape
        except RuntimeError as error:
            return str(error)

    with using(name):
        assert outcome(ops.conv, groups) == outcome(F.conv2d, 1, groups)


def test_reference_is_exact_where_the_answer_is_known():
    """The oracle itself: ones with ones count the pixels under the kernel."""
    x, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    exact, _ = reference(x, weight, None, (1, 1), (1, 1), 1)
    assert exact[0].flatten().tolist() == [4, 6, 4, 6, 9, 6, 4, 6, 4]
