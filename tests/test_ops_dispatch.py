"""Which algorithm runs: forcing, refusals, the recorded costs, a machine without a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from timm_contconv import ops

COSTS = {
    key: row
    for name in ("costs.json", "dense_costs.json")
    for key, row in json.loads(Path(ops.__file__).with_name(name).read_text())["regret"].items()
}


def operators(fn) -> set[str]:
    """Names of the convolution operators that a call runs."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return {str(op) for op in counter.get_flop_counts()["Global"]}


def test_the_algorithms_are_listed():
    assert {"pytorch", "channels_last", "direct", "fft", "gemm"} <= set(ops.algorithms())


def test_an_unknown_algorithm_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name='winograd'.*pytorch.*fft"), ops.algorithm("winograd"):
        pass


def test_an_unknown_pass_is_refused():
    with pytest.raises(ValueError, match="'bias' is not one of output, input, weight"):  # noqa: SIM117
        with ops.algorithm("fft", passes=("weight", "bias")):
            pass


@pytest.mark.parametrize(
    ("name", "x", "says"),
    [
        ("direct", torch.zeros(1, 2, 9, 9, dtype=torch.float64), "float32 and bfloat16 only"),
        ("direct", torch.zeros(1, 2, 9, 9, 9), "1 or 2 spatial dimensions"),
        ("gemm", torch.zeros(1, 2, 40, 40), "1600 pixels"),
    ],
)
def test_an_algorithm_that_does_not_apply_says_why_and_names_others(name, x, says):
    weight = torch.zeros(2, 1, *[3] * (x.ndim - 2), dtype=x.dtype)
    with ops.algorithm(name), pytest.raises(ValueError, match=f"{name!r} does not apply.*{says}.*These do: .*fft"):
        ops.depthwise_conv(x, weight)


def test_a_pass_can_be_forced_alone():
    """The direct algorithm refuses float64, so what it is forced for shows."""
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    with ops.algorithm("direct", passes=("weight",)):
        ops.depthwise_conv(x, weight.detach()).sum().backward()
        out = ops.depthwise_conv(x.detach(), weight).sum()
        with pytest.raises(ValueError, match="weight pass"):
            out.backward()


def test_the_inner_choice_wins_and_the_outer_one_comes_back():
    x, weight = torch.randn(1, 2, 9, 9, dtype=torch.float64), torch.randn(2, 1, 5, 5, dtype=torch.float64)
    with ops.algorithm("direct"):
        with ops.algorithm("fft"):
            ops.depthwise_conv(x, weight)
        with pytest.raises(ValueError, match="direct"):
            ops.depthwise_conv(x, weight)
    ops.depthwise_conv(x, weight)


def test_a_backward_outside_the_context_uses_what_the_forward_was_forced_to():
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    with ops.algorithm("direct", passes=("input",)):
        out = ops.depthwise_conv(x, torch.randn(2, 1, 5, 5, dtype=torch.float64)).sum()
    with pytest.raises(ValueError, match="input pass"):
        out.backward()


def test_a_small_convolution_is_plain_pytorch():
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 1, 3, 3)
    assert operators(lambda: ops.conv(x, weight, None, (1, 1), (1, 1), 8)) == {"aten.convolution"}


def test_a_large_depthwise_convolution_is_not():
    x, weight = torch.randn(2, 64, 28, 28), torch.randn(64, 1, 23, 23)
    assert operators(lambda: ops.conv(x, weight, None, (1, 1), (11, 11), 64)) == {"timm_contconv.depthwise_conv"}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_other_convolutions_are_pytorchs(groups, dims):
    x, weight = torch.randn(2, 4, *[6] * dims), torch.randn(8, 4 // groups, *[3] * dims)
    expected = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims](x, weight, None, 2, 1, 1, groups)
    assert torch.equal(ops.conv(x, weight, None, (2,) * dims, (1,) * dims, groups), expected)


def test_a_dense_kernel_of_16000_taps_is_fast_enough_to_run():
    """A direct convolution would make 8 G multiply-adds here, and 16 times that with 16 channels."""
    x, weight = torch.randn(1, 4, 31999), torch.randn(8, 4, 16000)
    out = ops.conv(x, weight, None, (1,), (0,), 1)
    expected = torch.einsum("ik,oik->o", x[0, :, 100:16100].double(), weight.double())
    torch.testing.assert_close(out[0, :, 100].double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("key", sorted(COSTS))
def test_the_recorded_rule_picks_nearly_the_fastest(key):
    assert COSTS[key]["mean"] <= 1.25


def test_without_a_compiler_it_warns_once_and_still_computes(tmp_path):
    code = """
import warnings, torch
from timm_contconv import ops
x, weight = torch.randn(2, 64, 28, 28), torch.randn(64, 1, 23, 23)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = ops.depthwise_conv(x, weight, None, 1, 11)
    ops.depthwise_conv(x, weight, None, 1, 11)
assert len([w for w in caught if "C++17 compiler" in str(w.message)]) == 1, caught
torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, None, 1, 11, 1, 64), rtol=1e-4, atol=1e-3)
try:
    with ops.algorithm("direct"):
        ops.depthwise_conv(x, weight, None, 1, 11)
except ValueError as error:
    assert "could not be compiled" in str(error)
else:
    raise AssertionError("direct ran without a compiler")
"""
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_the_library_is_built_once_into_the_cache(tmp_path):
    code = """
import torch
from timm_contconv import ops
with ops.algorithm("direct"):
    ops.depthwise_conv(torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3))
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    runs = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
        runs.append([(p.name, p.stat().st_mtime_ns) for p in (tmp_path / "timm_contconv").iterdir()])
    assert len(runs[0]) == 1
    assert runs[0] == runs[1]
