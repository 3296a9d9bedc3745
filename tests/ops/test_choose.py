"""Which algorithm runs: forcing, refusals, a machine without a compiler."""

import os
import subprocess
import sys

import pytest
import torch

from timm_contconv import ops


def conv(x, weight):
    return ops.conv(x, weight, None, (1,) * (x.ndim - 2), (0,) * (x.ndim - 2), x.shape[1] // weight.shape[1])


def double_case():
    """Of a dtype that the compiled loops refuse, so that it is seen what is forced."""
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)


def test_the_algorithms_are_listed():
    assert {"pytorch", "channels_last", "direct", "fft", "dft", "triton_4x16", "triton_8x8"} <= set(ops.algorithms())


def test_an_unknown_algorithm_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name='winograd'.*pytorch.*fft"), ops.algorithm("winograd"):
        pass


def test_an_unknown_pass_is_refused():
    with pytest.raises(ValueError, match="'bias' is not one of output, input, weight"):  # noqa: SIM117
        with ops.algorithm("fft", passes=("weight", "bias")):
            pass


@pytest.mark.parametrize(
    ("name", "x", "weight", "says"),
    [
        ("direct", torch.zeros(1, 2, 9, 9, dtype=torch.float64), (2, 1, 3, 3), "float32 and bfloat16 only"),
        ("direct", torch.zeros(1, 2, 9, 9, 9), (2, 1, 3, 3, 3), "1 or 2 spatial dimensions"),
        ("direct", torch.zeros(1, 2, 9, 9), (2, 2, 3, 3), "depthwise convolutions only"),
        ("channels_last", torch.zeros(1, 2, 9, 9), (4, 1, 3, 3), "depthwise convolutions only"),
        ("dft", torch.zeros(1, 2, 9, 9), (2, 1, 3, 3), "groups=1"),
        ("dft", torch.zeros(1, 1, 9, 300), (1, 1, 3, 3), "up to 192 pixels, not 300"),
        ("triton_8x8", torch.zeros(1, 2, 9, 9), (2, 1, 3, 3), "CUDA only"),
    ],
)
def test_an_algorithm_that_does_not_apply_says_why_and_names_others(name, x, weight, says):
    with ops.algorithm(name), pytest.raises(ValueError, match=f"{name!r} does not apply.*{says}.*These do: .*fft"):
        conv(x, torch.zeros(weight, dtype=x.dtype))


def test_a_pass_can_be_forced_alone():
    x, weight = double_case()
    with ops.algorithm("direct", passes=("weight",)):
        conv(x, weight.detach()).sum().backward()
        out = conv(x.detach(), weight).sum()
        with pytest.raises(ValueError, match="weight pass"):
            out.backward()


def test_the_inner_choice_wins_and_the_outer_one_comes_back():
    x, weight = double_case()
    with ops.algorithm("direct"):
        with ops.algorithm("fft"):
            conv(x, weight)
        with pytest.raises(ValueError, match="direct"):
            conv(x, weight)
    conv(x, weight)


def test_a_backward_outside_the_context_uses_what_the_forward_was_forced_to():
    x, weight = double_case()
    with ops.algorithm("direct", passes=("input",)):
        out = conv(x, weight.detach()).sum()
    with pytest.raises(ValueError, match="input pass"):
        out.backward()


@pytest.mark.slow
def test_without_a_compiler_it_warns_once_and_still_computes(tmp_path):
    code = """
import warnings, torch
from timm_contconv import ops
x, weight = torch.randn(2, 64, 28, 28), torch.randn(64, 1, 23, 23)
arguments = x, weight, None, (1, 1), (11, 11), 64
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = ops.conv(*arguments)
    ops.conv(*arguments)
assert len([w for w in caught if "C++17 compiler" in str(w.message)]) == 1, caught
torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, None, 1, 11, 1, 64), rtol=1e-4, atol=1e-3)
try:
    with ops.algorithm("direct"):
        ops.conv(*arguments)
except ValueError as error:
    assert "could not be compiled" in str(error)
else:
    raise AssertionError("direct ran without a compiler")
"""
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "", "TIMM_CONTCONV_CACHE": str(tmp_path / "empty")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
