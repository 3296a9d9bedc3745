"""The depthwise convolution against PyTorch's own in float64: values, gradients, layouts, errors."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_contconv import ops

from .memory import peak_allocation

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CPU_ALGORITHMS = ["pytorch", "channels_last", "direct", "fft", "gemm"]
STAGES = [(96, 56), (192, 28), (384, 14), (768, 7)]


def using(name: str):
    """Forces an algorithm; "default" leaves the choice to the cost rule."""
    return contextlib.nullcontext() if name == "default" else ops.algorithm(name)


def run(fn, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, grad: Tensor | None = None):
    """Output and gradients of a convolution for a fixed gradient of the output."""
    tensors = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = fn(*tensors[:2], tensors[2] if bias is not None else None, stride, padding)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out) if grad is None else grad
    return out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))


def plain(x, weight, bias, stride, padding):
    return PLAIN[weight.ndim - 2](x, weight, bias, stride, padding, 1, weight.shape[0])


def reference(x, weight, bias, stride, padding):
    """The same in float64, and the error scale of each: the sums if no terms cancelled, and no less than a term."""
    double = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = run(plain, *double, stride, padding)
    ones = [None if t is None else t.abs() for t in double]
    grad = torch.ones_like(exact[0])
    return exact, [t.max().clamp_min(1) for t in run(plain, *ones, stride, padding, grad)]


def assert_close(got, exact, scales, tolerance: float):
    for name, a, b, scale in zip(("output", "input", "weight", "bias"), got, exact, scales, strict=False):
        error = ((a.double() - b).abs().max() / scale).item() if a.numel() else 0.0
        assert error < tolerance, f"{name}: {error:.2e}"


@st.composite
def cases(draw, dims: int, most_size: int, most_kernel: int):
    """x, weight, bias, stride, padding of any shape for which a convolution exists."""
    ints = lambda low, high: draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))  # noqa: E731
    size, kernel, stride = ints(1, most_size), ints(1, most_kernel), ints(1, 3)
    padding = ints(0, most_kernel // 2 + 2)
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    batch, channels = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 16, 17, 33]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(batch, channels, *size, generator=generator)
    if dims == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    if draw(st.booleans()):
        x = torch.cat([x, x], 1)[:, 1 : channels + 1]
    weight = torch.randn(channels, 1, *kernel, generator=generator)
    bias = torch.randn(channels, generator=generator) if draw(st.booleans()) else None
    return x, weight, bias, tuple(stride), tuple(padding)


def check_every_algorithm(case):
    exact, scales = reference(*case)
    done = set()
    for name in ops.algorithms():
        with ops.algorithm(name):
            try:
                got = run(ops.depthwise_conv, *case)
            except ValueError as error:
                assert "does not apply" in str(error)  # noqa: PT017 - a refusal is one of two right answers
                continue
        assert_close(got, exact, scales, 1e-5)
        done.add(name)
    assert {"pytorch", "fft"} <= done
    assert_close(run(ops.depthwise_conv, *case), exact, scales, 1e-5)


@given(cases(2, 20, 23))
@settings(max_examples=80, deadline=None)
def test_every_algorithm_equals_float64_in_2d(case):
    check_every_algorithm(case)


@given(cases(1, 70, 90))
@settings(max_examples=40, deadline=None)
def test_every_algorithm_equals_float64_in_1d(case):
    check_every_algorithm(case)


@given(cases(3, 7, 8))
@settings(max_examples=20, deadline=None)
def test_every_algorithm_equals_float64_in_3d(case):
    check_every_algorithm(case)


@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
@pytest.mark.parametrize(("channels", "size"), STAGES[1:])
def test_convnext_shapes(name, channels, size):
    if name == "gemm" and size > 14:
        pytest.skip("a dense matrix of 784 x 784 per channel takes too long here")
    x, weight = torch.randn(1, channels // 4, size, size), torch.randn(channels // 4, 1, 23, 23)
    exact, scales = reference(x, weight, None, (1, 1), (11, 11))
    with using(name):
        assert_close(run(ops.depthwise_conv2d, x, weight, None, 1, 11), exact, scales, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
def test_half_precision_is_within_its_rounding(name, dtype):
    x = torch.randn(2, 48, 12, 11).to(dtype)
    weight, bias = torch.randn(48, 1, 9, 6).to(dtype), torch.randn(48).to(dtype)
    exact, scales = reference(x, weight, bias, (1, 1), (4, 2))
    try:
        with using(name):
            got = run(ops.depthwise_conv, x, weight, bias, 1, (4, 2))
    except ValueError as error:
        assert (name, dtype) == ("direct", torch.float16), error  # noqa: PT017
        return
    assert {t.dtype for t in got} == {dtype}
    assert_close(got, exact, scales, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["pytorch", "channels_last", "fft", "gemm"])
@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (2, 1)), ((2, 3), (3, 0))])
def test_gradcheck_to_second_order(name, stride, padding):
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    with ops.algorithm(name):
        fn = lambda *tensors: ops.depthwise_conv(*tensors, stride, padding)  # noqa: E731
        assert torch.autograd.gradcheck(fn, (x, weight, bias))
        assert torch.autograd.gradgradcheck(fn, (x, weight, bias))


def test_double_backward_of_the_compiled_kernels():
    x = torch.randn(1, 16, 9, 9, requires_grad=True)
    weight = torch.randn(16, 1, 5, 5, requires_grad=True)

    def penalty(fn):
        (grad,) = torch.autograd.grad(fn(x, weight, None, 1, 2).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), (x, weight))

    with ops.algorithm("direct"):
        got = penalty(ops.depthwise_conv)
    for a, b in zip(got, penalty(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding", [0, 4])
def test_results_have_the_layout_of_the_input(name, form, padding):
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=form).requires_grad_()
    with using(name):
        out = ops.depthwise_conv2d(x, torch.randn(16, 1, 9, 9), None, 1, padding)
        out.sum().backward()
    assert out.is_contiguous(memory_format=form)
    assert x.grad.is_contiguous(memory_format=form)


@pytest.mark.parametrize("name", ["default", *CPU_ALGORITHMS])
def test_a_gradient_that_is_not_needed_is_not_computed(name):
    x, weight = torch.randn(1, 16, 14, 14), torch.randn(16, 1, 13, 13)
    with using(name), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.depthwise_conv(x, weight.requires_grad_(), None, 1, 6).sum().backward()
    names = [str(op) for op in counter.get_flop_counts()["Global"]]
    assert not any("input_gradient" in n for n in names), names
    assert x.grad is None


def test_an_image_that_only_a_frozen_weight_would_read_is_not_kept():
    x = torch.randn(1, 64, 28, 28, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with hooks, ops.algorithm("direct"):
        ops.depthwise_conv(x, torch.randn(64, 1, 9, 9), None, 1, 4)
    assert torch.Size([1, 64, 28, 28]) not in kept


def test_a_kernel_of_16000_taps_over_a_causal_sequence():
    x, weight = torch.randn(1, 3, 16000), torch.randn(3, 1, 16000)
    out = ops.depthwise_conv1d(F.pad(x, (15999, 0)), weight)
    x, weight = x.double(), weight.double()
    for t in (0, 1, 777, 15999):
        expected = (x[..., : t + 1] * weight[:, 0, 15999 - t :]).sum(-1)
        torch.testing.assert_close(out[..., t].double(), expected, rtol=1e-4, atol=1e-3)


def test_flops_are_those_of_a_convolution():
    x = torch.randn(2, 16, 9, 8, requires_grad=True)
    weight = torch.randn(16, 1, 5, 3, requires_grad=True)
    with ops.algorithm("direct"), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.depthwise_conv(x, weight, None, 1, (2, 1)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * math.prod((2, 16, 9, 8)) * 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 13])
def test_autocast_casts_as_a_convolution_does(dtype, kernel):
    x = torch.randn(1, 48, 14, 14, requires_grad=True)
    weight, bias = torch.randn(48, 1, kernel, kernel, requires_grad=True), torch.randn(48)
    with torch.autocast("cpu", dtype):
        out = ops.depthwise_conv2d(x, weight, bias, 1, kernel // 2)
        expected = F.conv2d(x, weight, bias, 1, kernel // 2, 1, 48)
    out.float().sum().backward()
    assert out.dtype == expected.dtype == dtype
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    scale = expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)


def test_autocast_leaves_float64():
    x, weight = torch.randn(1, 4, 9, 9).double(), torch.randn(4, 1, 9, 9).double()
    with torch.autocast("cpu", torch.bfloat16), ops.algorithm("fft"):
        assert ops.depthwise_conv2d(x, weight, None, 1, 4).dtype == torch.float64


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "padding", "says"),
    [
        ((1, 4, 9, 9), (3, 1, 3, 3), (1, 1), (1, 1), r"weight \(3, 1, 3, 3\): expected \(4, 1"),
        ((1, 4, 9, 9), (4, 2, 3, 3), (1, 1), (1, 1), r"weight \(4, 2, 3, 3\): expected \(4, 1"),
        ((1, 4, 9), (4, 1, 3, 3), (1, 1), (1, 1), r"x \(1, 4, 9\)"),
        ((1, 4, 9, 9), (4, 1, 3, 3), (0, 1), (1, 1), "stride"),
        ((1, 4, 9, 9), (4, 1, 3, 3), (1, 1), (1, -1), "padding"),
        ((1, 4, 9, 9), (4, 1, 15, 3), (1, 1), (1, 1), r"kernel \(15, 3\): larger"),
    ],
)
def test_arguments_that_do_not_fit_are_named(shape, weight, stride, padding, says):
    with ops.algorithm("fft"), pytest.raises(ValueError, match=says):
        ops.depthwise_conv(torch.randn(shape), torch.randn(weight), None, stride, padding)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_what_is_no_real_floating_point_number_is_pytorchs(dtype):
    x, weight = torch.randint(-5, 5, (1, 4, 20, 20)).to(dtype), torch.randint(-5, 5, (4, 1, 9, 9)).to(dtype)
    with ops.algorithm("fft"):
        assert torch.equal(ops.depthwise_conv2d(x, weight, padding=4), F.conv2d(x, weight, padding=4, groups=4))


def test_an_empty_batch():
    weight = torch.randn(4, 1, 9, 9, requires_grad=True)
    out = ops.depthwise_conv2d(torch.randn(0, 4, 9, 9), weight, None, 1, 4)
    out.sum().backward()
    assert out.shape == (0, 4, 9, 9)
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("name", ["direct", "fft"])
def test_the_backward_needs_less_than_three_activations(name):
    """The gradients included."""
    x = torch.randn(8, 96, 28, 28, requires_grad=True)
    weight = torch.randn(96, 1, 13, 13, requires_grad=True)
    with ops.algorithm(name):
        out = ops.depthwise_conv(x, weight, None, 1, 6)
        grad = torch.randn_like(out)
        peak = peak_allocation(lambda: torch.autograd.grad(out, (x, weight), grad))
    assert x.nbytes <= peak <= 3 * x.nbytes
