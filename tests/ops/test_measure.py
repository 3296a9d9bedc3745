"""Measuring: what is measured, when nothing is, wrong candidates, and the record on disk."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from timm_contconv import ops
from timm_contconv.ops.algorithms import ALGORITHMS, fft
from timm_contconv.ops.measure import measure
from timm_contconv.ops.problem import Problem
from timm_contconv.ops.record import Record


def case(groups: int = 16, batch: int = 2, size: int = 24):
    x, weight = torch.randn(batch, 16, size, size), torch.randn(16, 16 // groups, 9, 9)
    return x, weight, Problem.of(x.shape, weight.shape, (1, 1), (4, 4), groups, x)


def tensors_of(pass_: str, groups: int) -> tuple[Problem, tuple[Tensor | None, ...]]:
    x, weight, problem = case(groups)
    grad = torch.randn(problem.output_shape)
    return problem, {"output": (x, weight, torch.randn(16)), "input": (grad, weight), "weight": (grad, x)}[pass_]


class WrongInTheLastPixel(fft.FFT):
    """Of the last image and channel."""

    name = "wrong"

    def run(self, pass_, problem, *tensors):
        result = super().run(pass_, problem, *tensors)
        result[(-1,) * result.ndim] += 1e-2 * result.abs().max()
        return result


class Raising(fft.FFT):
    name = "raising"

    def run(self, pass_, problem, *tensors):
        raise RuntimeError("out of registers")


class OutOfMemory(fft.FFT):
    name = "large"

    def run(self, pass_, problem, *tensors):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize("groups", [1, 16])
def test_rounding_where_the_result_is_zero_is_no_fault(groups):
    """A gradient of one pixel, and an image that is zero near it."""
    x, _, problem = case(groups)
    grad = torch.zeros(problem.output_shape)
    grad[..., 12, 12] = 1
    x[..., 6:19, 6:19] = 0
    times, faults = measure("weight", problem, (grad, x), [ALGORITHMS["pytorch"], ALGORITHMS["fft"]])
    assert faults == {}
    assert times.keys() == {"pytorch", "fft"}


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("pass_", ["output", "input", "weight"])
def test_right_algorithms_get_seconds_and_wrong_ones_a_reason(pass_, groups):
    problem, tensors = tensors_of(pass_, groups)
    right = [a for a in ALGORITHMS.values() if a.refusal(pass_, problem) is None]
    seconds, faults = measure(pass_, problem, tensors, [WrongInTheLastPixel(), Raising(), *right])
    assert seconds.keys() == {a.name for a in right}
    assert all(0 < t < 1 for t in seconds.values())
    assert faults.keys() == {"wrong", "raising"}
    assert faults["raising"] == "raised RuntimeError: out of registers"
    assert "was off by" in faults["wrong"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_is_held_to_its_own_precision(dtype):
    problem, tensors = tensors_of("output", 16)
    problem, tensors = problem._replace(dtype=dtype), [t.to(dtype) for t in tensors]
    right = [a for a in ALGORITHMS.values() if a.refusal("output", problem) is None]
    seconds, faults = measure("output", problem, tensors, right)
    assert seconds.keys() == {a.name for a in right}
    assert not faults


def test_images_with_nan_are_not_measured():
    problem, (x, *rest) = tensors_of("output", 16)
    x[-1, -1, 0, 0] = torch.nan
    assert measure("output", problem, (x, *rest), [*ALGORITHMS.values()]) == ({}, {})


def test_an_algorithm_is_timed_in_the_memory_that_it_left_itself():
    """Two equal algorithms; each takes longer where the other ran last, as with memory that was given back."""
    last = []

    class Waits(fft.FFT):
        def __init__(self, name):
            self.name = name

        def run(self, pass_, problem, *tensors):
            if last[-1:] != [self.name]:
                time.sleep(0.05)
            last.append(self.name)
            return super().run(pass_, problem, *tensors)

    x, weight, problem = case(batch=1)
    seconds, faults = measure("output", problem, (x, weight, None), [Waits("first"), Waits("second")])
    assert not faults
    assert max(seconds.values()) < 0.02


def test_zeros_are_measured_as_other_numbers_are():
    problem, tensors = tensors_of("output", 16)
    seconds, faults = measure("output", problem, [t * 0 for t in tensors], [ALGORITHMS["pytorch"], ALGORITHMS["fft"]])
    assert seconds.keys() == {"pytorch", "fft"}
    assert not faults


def record(name: str = "a machine") -> Record:
    return Record({"device": name})


SECONDS = {"pytorch": 2.0, "fft": 1.0}
NAMES = list(SECONDS)


def test_a_record_is_read_by_the_next_process(tmp_path):
    problem = case()[2]
    record().add("output", problem, SECONDS, {})
    assert record().find("output", problem, NAMES) == SECONDS
    assert record().find("input", problem, NAMES) is None
    assert record("another machine").find("output", problem, NAMES) is None
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_what_was_measured_without_a_candidate_is_measured_again(tmp_path):
    problem = case()[2]
    record().add("output", problem, SECONDS, {})
    with_another = record()
    assert with_another.find("output", problem, [*NAMES, "direct"]) is None
    with_another.add("output", problem, {**SECONDS, "direct": 0.5}, {})
    assert record().find("output", problem, [*NAMES, "direct"])["direct"] == 0.5


def test_what_does_not_fit_into_memory_is_not_tried_again():
    problem, tensors = tensors_of("output", 16)
    seconds, faults = measure("output", problem, tensors, [OutOfMemory(), ALGORITHMS["pytorch"]])
    assert seconds["large"] == torch.inf
    assert not faults
    record().add("output", problem, seconds, {})
    assert record().find("output", problem, ["large", "pytorch"]) == seconds


def test_two_processes_add_to_one_record():
    first, second = record(), record()
    problems = [case(batch=n)[2] for n in (1, 2)]
    first.add("output", problems[0], SECONDS, {})
    second.add("output", problems[1], SECONDS, {})
    assert all(record().find("output", p, NAMES) == SECONDS for p in problems)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"fingerprint": {"device": "b"}, "dropped": {}, "seconds": {}}',
        '{"fingerprint": {"device": "a machine"}, "dropped": {}, "seconds": {"output": {"fft": -1.0}}}',
        '{"fingerprint": {"device": "a machine"}, "dropped": {}, "seconds": {"output": {"fft": NaN}}}',
        '{"fingerprint": {"device": "a machine"}, "dropped": {}, "seconds": {"output": 3}}',
        '{"fingerprint": {"device": "a machine"}, "dropped": {"fft": 3}, "seconds": {}}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_replaced(content):
    path = record().path
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problem = case()[2]
    with pytest.warns(RuntimeWarning, match="not a record of measurements on this machine") as caught:  # noqa: PT031 - one
        damaged = record()
        assert damaged.find("output", problem, NAMES) is None
        damaged.add("output", problem, SECONDS, {})
    assert len(caught) == 1
    assert record().find("output", problem, NAMES) == SECONDS


def test_a_folder_that_can_not_be_written_is_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIMM_CONTCONV_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="not kept for the next process") as caught:  # noqa: PT031 - one
        unwritable = record()
        for n in (1, 2):
            unwritable.add("output", case(batch=n)[2], SECONDS, {})
    assert len(caught) == 1
    assert unwritable.find("output", case(batch=1)[2], NAMES) == SECONDS


def test_an_algorithm_is_dropped_for_good_with_one_warning_that_names_it():
    dropping = record()
    says = "'fft' is not used .* output pass of .* was off by 1.*Delete .*json"
    with pytest.warns(RuntimeWarning, match=says) as caught:  # noqa: PT031 - one warning for both
        for n in (1, 2):
            dropping.add("output", case(batch=n)[2], SECONDS, {"fft": "was off by 1"})
    assert len(caught) == 1
    assert record().dropped.keys() == {"fft"}


def test_images_of_ever_new_sizes_are_not_measured_for_ever():
    sized = record()
    for size in range(20, 28):
        problem = case(size=size)[2]
        assert sized.find("output", problem, ["fft"]) is None
        sized.add("output", problem, {"fft": size * 1e-6}, {})
    new = case(size=40)[2]
    assert sized.find("output", new, ["fft"]) == {"fft": pytest.approx(27e-6 * 40**2 / 27**2)}
    assert sized.find("output", new, ["fft", "direct"]) is None
    assert sized.find("input", new, ["fft"]) is None
    assert sized.find("output", new._replace(kernel_size=(11, 11)), ["fft"]) is None


# Integration: in processes of their own, as a process has one record per machine.

SETUP = """
import sys, warnings
import torch
from timm_contconv import ops
torch.set_num_threads(1)
x, weight = torch.randn(2, 32, 28, 28, requires_grad=True), torch.randn(32, 1, 17, 17, requires_grad=True)
def conv(x=x, weight=weight):
    return ops.conv(x, weight, None, (1, 1), (8, 8), 32)
def plain(x=x, weight=weight):
    return torch.nn.functional.conv2d(x, weight, None, 1, 8, 1, 32)
"""


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", SETUP + code]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "TIMM_CONTCONV_MEASURE": "1", **environment},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def seconds_in(folder: Path) -> dict[str, dict[str, float]]:
    files = list(folder.glob("measured-*.json"))
    return json.loads(files[0].read_text())["seconds"] if files else {}


def test_a_training_step_measures_three_passes_and_two_processes_share_them(tmp_path):
    code = """
y = conv()
torch.testing.assert_close(y, plain(), rtol=1e-4, atol=1e-3)
y.sum().backward()
for choice in ops.choices():
    assert choice.seconds[choice.algorithm] == min(choice.seconds.values()), choice
    assert choice.gain >= 1
print(*[(c.pass_, c.algorithm) for c in ops.choices()])
"""
    first = python(code)
    assert len(seconds_in(tmp_path)) == 3
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert python(code) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_what_was_measured_while_the_compiler_failed_is_measured_again_with_the_compiled_loops(tmp_path):
    without = """
from timm_contconv.ops.algorithms import ALGORITHMS, direct
class NotCompiled(direct.Direct):
    def refusal(self, pass_, problem):
        return "it could not be compiled"
ALGORITHMS["direct"] = NotCompiled()
"""
    code = "conv().sum().backward(); print(*[c.seconds.keys() for c in ops.choices()])"
    assert "direct" not in python(without + code)
    assert python(code).count("direct") == 3
    assert all("direct" in times for times in seconds_in(tmp_path).values())


@pytest.mark.slow
def test_where_nothing_is_measured(tmp_path):
    """Each line would measure what the others do not."""
    python("""
with ops.measuring(False):
    conv().sum().backward()
torch.use_deterministic_algorithms(True)
conv()
torch.use_deterministic_algorithms(False)
with ops.algorithm("fft"):
    conv().sum().backward()
ops.conv(torch.randn(1, 32, 4, 4), weight, None, (1, 1), (8, 8), 32)  # too small
ops.conv(torch.randn(0, 32, 28, 28), weight, None, (1, 1), (8, 8), 32)

frozen, images = weight.detach(), x.detach()
class Conv(torch.nn.Module):
    def forward(self, x):
        return conv(x, frozen)

torch.export.export(Conv(), (images,))
traced = torch.jit.trace(Conv(), (images,), check_trace=False)
from torch._subclasses import FakeTensorMode
with FakeTensorMode() as mode:
    conv(mode.from_tensor(images), mode.from_tensor(frozen))
torch.compile(Conv(), backend=lambda graph, inputs: lambda *args: [args[0]])(images)
assert ops.choices() == []
""")
    assert seconds_in(tmp_path) == {}


def test_the_environment_turns_measuring_off():
    """As conftest.py does for all tests."""
    assert os.environ["TIMM_CONTCONV_MEASURE"] == "0"
    before = ops.choices()
    ops.conv(torch.randn(2, 32, 28, 27), torch.randn(32, 1, 17, 17), None, (1, 1), (8, 8), 32)
    assert ops.choices() == before


@pytest.mark.slow
def test_a_wrong_algorithm_is_not_used_any_more(tmp_path):
    python("""
from timm_contconv.ops.algorithms import ALGORITHMS, direct
class Wrong(direct.Direct):
    def output(self, *args):
        return super().output(*args) * 1.01
ALGORITHMS["direct"] = Wrong()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for n in (2, 3):
        images = torch.randn(n, 32, 28, 28)
        torch.testing.assert_close(conv(images), plain(images), rtol=1e-4, atol=1e-3)
assert len(caught) == 1 and "'direct'" in str(caught[0].message), caught
with ops.algorithm("direct"):
    conv()
""")
