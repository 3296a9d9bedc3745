"""Convolutions between all channels by discrete Fourier transforms, against PyTorch's in float64."""

import contextlib
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from timm_contconv import ops
from timm_contconv.ops import dense_dft, dense_fft
from timm_contconv.ops.dense import is_cheaper_by_fft

from .memory import peak_allocation


@st.composite
def cases(draw):
    """x, weight, stride and padding of any two-dimensional convolution."""
    pair = lambda low, high: tuple(draw(st.lists(st.integers(low, high), min_size=2, max_size=2)))  # noqa: E731
    size, kernel, stride, padding = pair(1, 14), pair(1, 11), pair(1, 3), pair(0, 7)
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    n, c_in, c_out = (draw(st.integers(1, 4)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((n, c_in, *size), (c_out, c_in, *kernel)))
    form = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return x.contiguous(memory_format=form), weight, stride, padding


def passes(x, weight, stride, padding):
    """PyTorch's output, a gradient of it, and the gradients of x and weight."""
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = F.conv2d(*leaves, None, stride, padding)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().view_as(y)
    return y.detach(), grad, *torch.autograd.grad(y, leaves, grad)


@settings(deadline=None)
@given(cases())
def test_transforms_by_matrices_are_exact(case):
    x, weight, stride, padding = case[0].double(), case[1].double(), *case[2:]
    y, grad, to_x, to_weight = passes(x, weight, stride, padding)
    torch.testing.assert_close(dense_dft.output(x, weight, stride, padding), y)
    torch.testing.assert_close(dense_dft.input_gradient(grad, weight, x.shape[2:], stride, padding), to_x)
    torch.testing.assert_close(dense_dft.weight_gradient(grad, x, weight.shape[2:], stride, padding), to_weight)


@pytest.mark.parametrize("kernel", [9, 33])
def test_in_float32_they_are_as_exact_as_ffts(kernel):
    x, weight = torch.randn(2, 8, 32, 32), torch.randn(8, 8, kernel, kernel)
    one, half = (1, 1), (kernel // 2,) * 2
    y, grad, to_x, to_weight = passes(x.double(), weight.double(), one, half)
    arguments = {
        "output": (x, weight),
        "input_gradient": (grad.float(), weight, x.shape[2:]),
        "weight_gradient": (grad.float(), x, weight.shape[2:]),
    }
    for exact, (name, tensors) in zip((y, to_x, to_weight), arguments.items(), strict=True):
        by_matrices = (getattr(dense_dft, name)(*tensors, one, half) - exact).norm() / exact.norm()
        by_ffts = (getattr(dense_fft, name)(*tensors, one, half, 1) - exact).norm() / exact.norm()
        assert by_matrices < max(3 * by_ffts, 1e-6), name


BACKENDS = {
    "all": torch.backends,
    "cpu": torch.backends.mkldnn,
    "cpu products": torch.backends.mkldnn.matmul,
    "cuda products": torch.backends.cuda.matmul,
}


@contextlib.contextmanager
def precision(backend: str, value: str):
    """Sets one of PyTorch's precisions of float32, where no other is set."""
    before = {name: one.fp32_precision for name, one in BACKENDS.items()}
    try:
        for one in BACKENDS.values():
            one.fp32_precision = "none"
        BACKENDS[backend].fp32_precision = value
        yield
    finally:
        for name, one in BACKENDS.items():
            one.fp32_precision = before[name]


@pytest.mark.parametrize("value", ["bf16", "tf32", "ieee"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lower_precision_of_matrix_products_does_not_reach_transforms(backend, value):
    if (backend, value) == ("cuda products", "bf16"):
        pytest.skip("PyTorch has no such setting")
    x, weight = torch.randn(2, 8, 32, 32), torch.randn(8, 8, 9, 9)
    expected = F.conv2d(x.double(), weight.double(), padding=4)
    with precision(backend, value):
        got, double = ops.fft_conv(x, weight, padding=4), ops.fft_conv(x.double(), weight.double(), padding=4)
    assert (got - expected).norm() / expected.norm() < 1e-6
    torch.testing.assert_close(double, expected)


@pytest.mark.parametrize("value", ["high", "medium"])
def test_neither_does_one_that_is_set_for_all_devices(value):
    x, weight = torch.randn(2, 8, 32, 32), torch.randn(8, 8, 9, 9)
    before, expected = torch.get_float32_matmul_precision(), F.conv2d(x.double(), weight.double(), padding=4)
    try:
        torch.set_float32_matmul_precision(value)
        got = ops.fft_conv(x, weight, padding=4)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (got - expected).norm() / expected.norm() < 1e-6


def test_the_rule_knows_which_transforms_will_run():
    """For these the recorded times are 27 ms of PyTorch's, 62 of FFTs and 12 of transforms by matrices."""
    x, weight = torch.randn(4, 48, 32, 32), torch.empty(48, 48, 9, 9)
    choose = lambda x: is_cheaper_by_fft(x, weight.to(x.dtype), None, (1, 1), (4, 4), 1)  # noqa: E731
    assert choose(x)
    with precision("cpu products", "bf16"):
        assert not choose(x)
        assert choose(x.double())


def test_large_kernels_take_transforms_and_small_ones_do_not():
    x, one = torch.randn(8, 24, 32, 32), (1, 1)
    for kernel, expected in ((3, False), (9, True), (33, True)):
        assert is_cheaper_by_fft(x, torch.empty(24, 24, kernel, kernel), None, one, (kernel // 2,) * 2, 1) is expected


def test_low_precision_has_a_rule_of_its_own():
    x, weight = torch.randn(8, 24, 32, 32), torch.empty(24, 24, 9, 9)
    choose = lambda x: is_cheaper_by_fft(x, weight.to(x.dtype), None, (1, 1), (4, 4), 1)  # noqa: E731
    assert choose(x)
    assert choose(x.double())
    assert not choose(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not choose(x)


def test_memory_stays_below_two_activations_and_two_kernels():
    """Spectra of kernels would be twenty times as large as kernels."""
    x, weight = torch.randn(8, 96, 32, 32), torch.randn(96, 96, 9, 9)
    bound = 2 * (2 * x.nbytes + 4 * weight.nbytes)
    assert peak_allocation(lambda: ops.fft_conv(x, weight, padding=4)) < bound
    spectrum = 96 * 96 * 36 * 19 * 8
    assert bound < spectrum


@pytest.mark.parametrize("groups", [1, 2])
def test_ffts_of_large_images_need_little_memory(groups):
    """Spectra of all kernels would take 200 MiB."""
    x, weight = torch.randn(1, 32, 200, 200, requires_grad=True), torch.randn(32, 32 // groups, 15, 15)
    weight.requires_grad_()
    bound = 8 * x.nbytes
    assert peak_allocation(lambda: ops.fft_conv(x.detach(), weight.detach(), padding=7, groups=groups)) < bound
    y = ops.fft_conv(x, weight, padding=7, groups=groups)
    grad = torch.randn_like(y)
    assert peak_allocation(lambda: torch.autograd.grad(y, (x, weight), grad)) < bound + x.nbytes


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block_bytes", [1, 1 << 14, 1 << 16])
def test_blocks_of_channels_make_no_difference(monkeypatch, groups, block_bytes):
    monkeypatch.setattr(dense_fft, "_BLOCK_BYTES", block_bytes)
    x, weight = torch.randn(2, 6, 9, 11, dtype=torch.float64), torch.randn(9, 6 // groups, 5, 4, dtype=torch.float64)
    leaves = x.requires_grad_(), weight.requires_grad_()
    expected = F.conv2d(*leaves, None, (2, 1), (2, 3), 1, groups)
    grad = torch.randn_like(expected)
    geometry = (2, 1), (2, 3), groups
    got = (
        dense_fft.output(x.detach(), weight.detach(), *geometry),
        dense_fft.input_gradient(grad, weight.detach(), (9, 11), *geometry),
        dense_fft.weight_gradient(grad, x.detach(), (5, 4), *geometry),
    )
    for a, b in zip(got, (expected.detach(), *torch.autograd.grad(expected, leaves, grad)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form_of_grad", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_images_has_their_memory_format(form, form_of_grad):
    x = torch.randn(2, 8, 20, 20).contiguous(memory_format=form).requires_grad_()
    y = ops.fft_conv(x, torch.randn(8, 8, 9, 9), padding=4)
    grad = torch.randn(2, 8, 20, 20).contiguous(memory_format=form_of_grad)
    assert torch.autograd.grad(y, x, grad)[0].is_contiguous(memory_format=form)


def test_training_after_inference_and_inference_after_training():
    """Matrices of transforms are kept between calls."""
    x, weight = torch.randn(2, 3, 23, 21), torch.randn(4, 3, 9, 9, requires_grad=True)
    with torch.inference_mode():
        first = ops.fft_conv(x, weight, padding=4)
    y = ops.fft_conv(x, weight, padding=4)
    y.sum().backward()
    with torch.inference_mode():
        again = ops.fft_conv(x, weight, padding=4)
    assert torch.equal(first, y)
    assert torch.equal(again, y)
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=4).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [5, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_operator_in_graphs_serves_all_sizes(kernel, groups):
    """Where each of the two convolutions is the faster one, and gradients as well."""

    class Conv(torch.nn.Module):
        def forward(self, x, weight, bias):
            return ops.conv(x, weight, bias, (1, 1), (kernel // 2,) * 2, groups)

    weight, bias = torch.randn(8, 8 // groups, kernel, kernel, requires_grad=True), torch.randn(8)
    sides = [torch.export.Dim(name, min=16, max=256) for name in ("height", "width")]
    shapes = ({0: torch.export.Dim("batch", min=1, max=64), 2: sides[0], 3: sides[1]}, {}, {})
    exported = torch.export.export(Conv(), (torch.randn(3, 8, 32, 40), weight, bias), dynamic_shapes=shapes).module()
    compiled = torch.compile(Conv(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, height, width in ((1, 16, 16), (4, 40, 33), (16, 64, 20)):
        x = torch.randn(n, 8, height, width, requires_grad=True)
        expected = F.conv2d(x, weight, bias, padding=kernel // 2, groups=groups)
        wanted = torch.autograd.grad(expected.square().sum(), (x, weight))
        torch.testing.assert_close(exported(x, weight, bias), expected, rtol=1e-4, atol=1e-3)
        y = compiled(x, weight, bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
        for a, b in zip(torch.autograd.grad(y.square().sum(), (x, weight)), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2 * b.abs().max().item())


def test_no_images_and_kernels_that_are_too_large():
    weight = torch.randn(4, 3, 9, 9, requires_grad=True)
    y = ops.fft_conv(torch.randn(0, 3, 12, 12), weight, padding=4)
    assert y.shape == (0, 4, 12, 12)
    assert torch.autograd.grad(y.sum(), weight)[0].abs().max() == 0
    with pytest.raises(ValueError, match="larger than the input"):
        ops.fft_conv(torch.randn(1, 3, 8, 8), weight)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        ops.conv(torch.randn(1, 3, 8, 8), weight, None, (1, 1), (0, 0), 1)


@pytest.mark.parametrize(("kernel", "expected"), [(7, "aten.conv2d"), (33, "timm_contconv.fft_conv")])
def test_exported_graphs_hold_plain_convolutions_up_to_64_taps(kernel, expected):
    class Conv(torch.nn.Module):
        def forward(self, x, weight):
            return ops.conv(x, weight, None, (2, 2), (kernel // 2,) * 2, 1)

    graph = torch.export.export(Conv(), (torch.randn(2, 3, 32, 32), torch.randn(4, 3, kernel, kernel))).graph
    assert any(str(node.target).startswith(expected) for node in graph.nodes)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_what_is_no_real_floating_point_number_is_pytorchs(dtype):
    x, weight = torch.randint(-5, 5, (8, 24, 32, 32)), torch.randint(-5, 5, (24, 24, 9, 9))
    x, weight = (t.to(dtype) * (1 + 2j) if dtype.is_complex else t.to(dtype) for t in (x, weight))
    got, expected = ops.conv(x, weight, None, (1, 1), (4, 4), 1), F.conv2d(x, weight, padding=4)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=f"x is {dtype}: expected real floating-point numbers"):
        ops.fft_conv(x, weight, padding=4)


X, WEIGHT = torch.zeros(8, 24, 32, 32), torch.zeros(24, 24, 9, 9)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "stride", "padding", "says"),
    [
        (X, WEIGHT.double(), None, (1, 1), (4, 4), "weight is torch.float64 on cpu: expected x's torch.float32"),
        (X, WEIGHT.to("meta"), None, (1, 1), (4, 4), "weight is torch.float32 on meta: expected x's"),
        (X, WEIGHT, torch.zeros(24).double(), (1, 1), (4, 4), "bias is torch.float64 on cpu: expected x's"),
        (X, WEIGHT, torch.zeros(1), (1, 1), (4, 4), r"bias \(1,\): expected \(24,\)"),
        (X, WEIGHT[:1], torch.zeros(5), (1, 1), (4, 4), r"bias \(5,\): expected \(1,\)"),
        (X, WEIGHT, None, (1, 1), (-1, -1), r"padding=\(-1, -1\): expected at least 1 and 0"),
        (X, WEIGHT, None, (0, 1), (4, 4), r"stride=\(0, 1\), .*: expected at least 1 and 0"),
        (X, WEIGHT[:0], None, (1, 1), (4, 4), r"weight \(0, 24, 9, 9\): expected no dimension of size 0"),
        (X, WEIGHT[:, :12], None, (1, 1), (4, 4), r"weight \(24, 12, 9, 9\): expected .* groups=1"),
        (X[:, 0], WEIGHT, None, (1, 1), (4, 4), r"x \(8, 32, 32\), weight .*: expected \(N, C_in"),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_are_pytorchs_to_refuse(x, weight, bias, stride, padding, says):
    with pytest.raises(ValueError, match=says):
        ops.fft_conv(x, weight, bias, stride, padding)

    def outcome(convolution):
        try:
            return convolution(x, weight, bias, stride, padding).shape
        except RuntimeError as error:
            return str(error)

    assert outcome(lambda *args: ops.conv(*args, 1)) == outcome(F.conv2d)


def test_autocast_brings_dtypes_together():
    x, weight, bias = torch.randn(8, 24, 32, 32).bfloat16(), torch.randn(24, 24, 25, 25), torch.randn(24)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_cheaper_by_fft(x, weight, bias, (1, 1), (12, 12), 1)
        got, expected = ops.fft_conv(x, weight, bias, 1, 12), F.conv2d(x, weight, bias, 1, 12)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    with pytest.raises(ValueError, match="weight is torch.float32"):
        ops.fft_conv(x, weight, bias, 1, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("channels", "kernel"),
    [(2, (32,)), (4, (16,)), (6, (16,)), (8, (8,)), (8, (12,)), (14, (16,)), (4, (64,)), (8, (8, 8))],
)
def test_half_precision_where_onednn_errs(channels: int, kernel: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(2, channels, *[40] * len(kernel))
    weight, bias = torch.randn(6, channels, *kernel) / math.prod(kernel) ** 0.5, torch.randn(6)
    geometry = (1,) * len(kernel), tuple(k // 2 for k in kernel), 1
    convolve = F.conv1d if len(kernel) == 1 else F.conv2d
    expected = convolve(x.double(), weight.double(), bias.double(), *geometry[:2]).float()
    actual = ops.conv(x.to(dtype), weight.to(dtype), bias.to(dtype), *geometry)
    assert actual.dtype == dtype
    assert (actual - expected).norm() < 0.02 * expected.norm()
    with torch.autocast("cpu", dtype):
        assert (ops.conv(x, weight, bias, *geometry) - expected).norm() < 0.02 * expected.norm()
