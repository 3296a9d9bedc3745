"""What the engine costs besides convolving: Python's share of a short call, and measuring.

    python -m benchmarks.speed.overhead [--threads 2] [--batch 8] [--size 224] [--steps 5] [--output FILE]

Python's share: a depthwise 3x3 convolution of one image, 384 channels of 14 x 14 pixels, in inference; the whole call,
less the compiled loops with everything prepared and a new tensor for their output: the median difference of turns of 40
calls, on one thread. And the call with loops that do nothing, so that the processor's caches keep what Python needs.

Measuring: a training step of convnext_tiny_dcls_gauss that measures all its problems, less the median of the steps
after it, as a share of 200 steps. The cache is empty; the build of the compiled loops, once per machine, is timed by
itself.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from typing import Any
from unittest import mock

import timm
import torch
from torch.nn import functional as F

from benchmarks.common import (
    arguments,
    in_turns,
    machine,
    machine_file,
    medians,
    new_parser,
    require,
    training_step,
    write_results,
)
from timm_contconv import ops
from timm_contconv.ops.algorithms import direct
from timm_contconv.ops.algorithms.direct import as_struct
from timm_contconv.ops.algorithms.library import library
from timm_contconv.ops.problem import Problem

CHANNELS, SIZE, KERNEL = 384, 14, 3
CALLS, ROUNDS = 40, 301
RUN = 200  # steps


def many(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


@torch.no_grad()
def python_share() -> dict[str, float]:
    """Microseconds of a call, of the compiled loops in it, of the rest, and of PyTorch's own convolution."""
    x, weight, bias = (
        torch.randn(1, CHANNELS, SIZE, SIZE),
        torch.randn(CHANNELS, 1, KERNEL, KERNEL),
        torch.randn(CHANNELS),
    )
    geometry = (1, 1), (KERNEL // 2,) * 2
    problem = Problem.of(x.shape, weight.shape, *geometry, CHANNELS, x)
    struct = as_struct(problem, 1, x.stride(), x.stride())
    pointers = [tensor.data_ptr() for tensor in (x, weight, bias)]
    loops: Any = library()

    def run_loops() -> None:
        out = torch.empty_like(x)
        loops.contconv_forward(*struct, *pointers, out.data_ptr())

    calls = {
        "call": lambda: ops.conv(x, weight, bias, *geometry, CHANNELS),
        "compiled loops": run_loops,
        "F.conv2d": lambda: F.conv2d(x, weight, bias, *geometry, 1, CHANNELS),
    }
    torch.testing.assert_close(calls["call"](), calls["F.conv2d"](), rtol=1e-4, atol=1e-4)
    chosen = next(choice for choice in ops.choices() if choice.problem == problem)
    require(chosen.algorithm == "direct", f"Python's share, because {chosen.algorithm} is faster than compiled loops")
    times = in_turns({name: many(call) for name, call in calls.items()}, ROUNDS, "short calls")
    found = {name: 1e6 * value / CALLS for name, value in medians(times).items()}
    differences = [a - b for a, b in zip(times["call"], times["compiled loops"], strict=True)]
    return {
        **found,
        "Python": 1e6 * statistics.median(differences) / CALLS,
        "without loops": without_loops(calls["call"]),
    }


def without_loops(call: Callable[[], object]) -> float:
    """Microseconds of a call whose compiled loops do nothing."""
    nothing = mock.patch.object(direct, "_function", return_value=lambda *_: None)
    with ops.measuring(False), nothing:  # decisions of their own, which nothing else uses
        return 1e6 * min(timeit.repeat(call, number=1000, repeat=20)) / 1000


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measuring_cost(batch: int, size: int, steps: int) -> dict[str, float]:
    """Seconds that measuring adds to a training step, and its share of RUN steps."""
    step = training_step(timm.create_model("convnext_tiny_dcls_gauss"), torch.randn(batch, 3, size, size))
    with ops.measuring(False):
        step()  # what is loaded and allocated once
    first = seconds_of(step)
    usual = statistics.median(seconds_of(step) for _ in range(steps))
    return {"first step": first, "later steps": usual, "share of 200 steps": (first - usual) / (RUN * usual)}


def main() -> None:
    parser = new_parser(__doc__, machine_file("overhead.json"), torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=5)
    options = arguments(parser)
    print(machine())
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TIMM_CONTCONV_CACHE"] = cache
        results: dict[str, Any] = {"build of the compiled loops, seconds": seconds_of(library)}
        results["measuring, seconds"] = measuring_cost(options.batch, options.size, options.steps)
        torch.set_num_threads(1)
        results["short call, microseconds"] = python_share()
        torch.set_num_threads(options.threads)
    for name, value in results.items():
        print(name, value)
    write_results(options.output, {"batch": options.batch, "size": options.size, **results})


if __name__ == "__main__":
    main()
