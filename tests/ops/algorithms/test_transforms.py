"""What the transforms promise beyond values: precision, memory, and matrices that are kept between calls."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from timm_contconv import ops
from timm_contconv.ops.algorithms import fft

from ...memory import peak_allocation
from ..reference import plain, run

ONE = (1, 1)


@pytest.mark.parametrize("kernel", [9, 33])
def test_in_float32_matrix_products_are_as_exact_as_ffts(kernel):
    case = torch.randn(2, 8, 32, 32), torch.randn(8, 8, kernel, kernel), None, ONE, (kernel // 2,) * 2, 1
    exact = run(plain, case[0].double(), case[1].double(), *case[2:])
    errors = {}
    for name in ("dft", "fft"):
        with ops.algorithm(name):
            errors[name] = [
                ((a - b).norm() / b.norm()).item() for a, b in zip(run(ops.conv, *case), exact, strict=True)
            ]
    assert all(a < max(3 * b, 1e-6) for a, b in zip(errors["dft"], errors["fft"], strict=True)), errors


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


def check_exactness():
    x, weight = torch.randn(2, 8, 32, 32), torch.randn(8, 8, 17, 17)
    expected = F.conv2d(x.double(), weight.double(), padding=8)
    for name in ("dft", "fft"):
        with ops.algorithm(name), contextlib.suppress(ValueError):
            got = ops.conv(x, weight, None, ONE, (8, 8), 1)
            assert (got - expected).norm() / expected.norm() < 1e-6
            torch.testing.assert_close(ops.conv(x.double(), weight.double(), None, ONE, (8, 8), 1), expected)


@pytest.mark.parametrize("value", ["bf16", "tf32", "ieee"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lower_precision_of_matrix_products_does_not_reach_transforms(backend, value):
    if (backend, value) == ("cuda products", "bf16"):
        pytest.skip("PyTorch has no such setting")
    with precision(backend, value):
        check_exactness()


@pytest.mark.parametrize("value", ["high", "medium"])
def test_neither_does_one_that_is_set_for_all_devices(value):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(value)
        check_exactness()
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_lower_precision_says_why_matrix_products_do_not_apply():
    with precision("cpu products", "bf16"), ops.algorithm("dft"), pytest.raises(ValueError, match="rounded to bf16"):
        ops.conv(torch.randn(1, 2, 9, 9), torch.randn(2, 2, 5, 5), None, ONE, (2, 2), 1)


def test_memory_of_matrix_products_stays_below_two_activations_and_two_kernels():
    """Spectra of kernels would be twenty times as large as kernels."""
    x, weight = torch.randn(8, 96, 32, 32), torch.randn(96, 96, 9, 9)
    bound = 2 * (2 * x.nbytes + 4 * weight.nbytes)
    with ops.algorithm("dft"):
        assert peak_allocation(lambda: ops.conv(x, weight, None, ONE, (4, 4), 1)) < bound
    assert bound < 96 * 96 * 36 * 19 * 8


@pytest.mark.parametrize("groups", [1, 2])
def test_ffts_of_large_images_need_little_memory(groups):
    """Spectra of all kernels would take 200 MiB."""
    x, weight = torch.randn(1, 32, 200, 200, requires_grad=True), torch.randn(32, 32 // groups, 15, 15)
    weight.requires_grad_()
    bound = 8 * x.nbytes
    with ops.algorithm("fft"):
        arguments = None, ONE, (7, 7), groups
        assert peak_allocation(lambda: ops.conv(x.detach(), weight.detach(), *arguments)) < bound
        y = ops.conv(x, weight, *arguments)
        grad = torch.randn_like(y)
        assert peak_allocation(lambda: torch.autograd.grad(y, (x, weight), grad)) < bound + x.nbytes


@pytest.mark.parametrize("name", ["direct", "fft"])
def test_the_backward_of_a_depthwise_one_needs_less_than_three_activations(name):
    """The gradients included."""
    x = torch.randn(8, 96, 28, 28, requires_grad=True)
    weight = torch.randn(96, 1, 13, 13, requires_grad=True)
    with ops.algorithm(name):
        out = ops.conv(x, weight, None, ONE, (6, 6), 96)
        grad = torch.randn_like(out)
        peak = peak_allocation(lambda: torch.autograd.grad(out, (x, weight), grad))
    assert x.nbytes <= peak <= 3 * x.nbytes


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("block_bytes", [1, 1 << 14, 1 << 16])
def test_blocks_of_channels_make_no_difference(monkeypatch, groups, block_bytes):
    monkeypatch.setattr(fft, "_MOST_BYTES", block_bytes)
    x, weight = torch.randn(2, 6, 9, 11, dtype=torch.float64), torch.randn(6, 6 // groups, 5, 4, dtype=torch.float64)
    case = x, weight, None, (2, 1), (2, 3), groups
    with ops.algorithm("fft"):
        for a, b in zip(run(ops.conv, *case), run(plain, *case), strict=True):
            torch.testing.assert_close(a, b)


def test_training_after_inference_and_inference_after_training():
    """Matrices of transforms are kept between calls."""
    x, weight = torch.randn(2, 3, 23, 21), torch.randn(4, 3, 9, 9, requires_grad=True)
    arguments = x, weight, None, ONE, (4, 4), 1
    with ops.algorithm("dft"):
        with torch.inference_mode():
            first = ops.conv(*arguments)
        y = ops.conv(*arguments)
        y.sum().backward()
        with torch.inference_mode():
            again = ops.conv(*arguments)
    assert torch.equal(first, y)
    assert torch.equal(again, y)
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=4).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)
