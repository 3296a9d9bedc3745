"""The Triton kernels, run by Triton's interpreter on the CPU, against PyTorch's convolution in float64.

The interpreter is chosen by an environment variable when Triton is imported, so the checks run in a process of
their own.
"""

import json
import os
import subprocess
import sys

import pytest

CASES = [
    # batch, channels, size, kernel, stride, padding
    (2, 2, (5, 6), (3, 4), (1, 1), (1, 2)),
    (1, 2, (3, 5), (9, 11), (1, 1), (4, 5)),
    (3, 2, (7, 8), (2, 5), (2, 3), (3, 1)),
    (1, 2, (3, 70), (2, 5), (1, 2), (0, 4)),
    (1, 2, (90,), (40,), (1,), (20,)),
    (2, 2, (4, 6), (3, 2), (3, 1), (4, 5)),
    (2, 2, (5, 7), (31, 31), (1, 1), (15, 15)),
    (1, 2, (9, 18), (5, 3), (1, 1), (5, 4)),
]
CHECK = """
import json
import sys
import torch
import torch.nn.functional as F
from timm_contconv import ops


def check(name, dtype, batch, channels, size, kernel, stride, padding):
    x = torch.randn(batch, channels, *size).to(dtype).requires_grad_()
    weight = torch.randn(channels, 1, *kernel).to(dtype).requires_grad_()
    bias = torch.randn(channels).to(dtype)
    plain = {1: F.conv1d, 2: F.conv2d}[len(size)]
    exact = plain(x.double(), weight.double(), bias.double(), stride, padding, 1, channels)
    grad = torch.randn(exact.shape).to(dtype)
    expected = exact, *torch.autograd.grad(exact, (x, weight), grad.double())
    with ops.algorithm(name):
        out = ops.conv(x, weight, bias, stride, padding, channels)
        got = out, *torch.autograd.grad(out, (x, weight), grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, a, b in zip(("output", "input", "weight"), got, expected):
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)).item()
        assert error < tolerance, (name, error, dtype, x.shape, weight.shape)


def check_nan(name):
    # a NaN in an image reaches what it reaches in PyTorch's convolution, and no other image
    x, weight = torch.randn(3, 2, 9, 9), torch.randn(2, 1, 3, 3)
    x[1, 0, 4, 4] = torch.nan
    with ops.algorithm(name):
        out = ops.conv(x, weight, None, (1, 1), (1, 1), 2)
    expected = F.conv2d(x, weight, None, 1, 1, 1, 2)
    assert out[expected.isnan()].isnan().all()
    torch.testing.assert_close(out[::2], expected[::2], rtol=1e-4, atol=1e-4)


torch.manual_seed(0)
check_nan("triton_8x8")
for name, dtype, *case in json.loads(sys.argv[1]):
    check(name, getattr(torch, dtype), *case)
"""


def run(cases):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHECK, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_three_passes_in_float32_and_in_half_precision_with_float32_sums():
    run([("triton_8x8", dtype, *CASES[0]) for dtype in ("float32", "bfloat16")])


@pytest.mark.slow
def test_large_kernels_strides_and_other_tiles():
    cases = [("triton_8x8", "float16", *CASES[0]), *(("triton_8x8", "float32", *case) for case in CASES[1:])]
    run([*cases, ("triton_1x64", "float32", *CASES[4]), ("triton_4x32", "float32", *CASES[3])])
