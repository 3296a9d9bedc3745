"""Fits the cost rule of the depthwise convolution to this machine, and writes timm_contconv/ops/costs.json.

    python -m benchmarks.depthwise_fit [--output FILE] [--samples FILE]

Every algorithm runs every pass at a grid of shapes; the rule is fitted as `benchmarks/cost_rule.py` says, to the
amounts of work that `Algorithm.features` gives.
"""

import argparse
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.cost_rule import SLOW_SECONDS, Samples, record, seconds
from timm_contconv import ops
from timm_contconv.ops import dispatch
from timm_contconv.ops.depthwise import depthwise_conv, input_gradient, weight_gradient
from timm_contconv.ops.problem import PASSES, Problem

# (batch, channels, size), by number of spatial dimensions; the first ones serve every dtype, all serve float32.
SHAPES = {
    1: [(4, 32, (512,)), (1, 64, (4096,)), (1, 4, (16000,))],
    2: [
        *((2, 192, (28, 28)), (8, 768, (7, 7)), (1, 8, (16, 16))),
        *((2, 96, (56, 56)), (4, 384, (14, 14)), (1, 384, (14, 14)), (8, 16, (32, 32))),
    ],
    3: [(1, 8, (16, 16, 16)), (1, 16, (8, 28, 28)), (2, 32, (4, 14, 14))],
}
SHAPES_FOR_EVERY_DTYPE = 3
KERNELS = {1: [3, 31, 127, 511, 4095, 15999], 2: [3, 5, 7, 13, 17, 23, 35], 3: [3, 5, 9]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A slower convolution than this (in multiply-adds, products with the padding included) is not waited for.
MOST_MACS = {"pytorch": 6e8, "channels_last": 1e9, "direct": 2e9}
MOST_GEMM_ELEMENTS = 2e7


def problems() -> Iterator[tuple[Problem, torch.memory_format]]:
    """The grid: float32 in full, the other types at fewer shapes and at every other kernel size."""
    for dtype, dims in itertools.product(DTYPES, SHAPES):
        full = dtype == torch.float32
        shapes = SHAPES[dims] if full else SHAPES[dims][:SHAPES_FOR_EVERY_DTYPE]
        kernels = KERNELS[dims] if full else KERNELS[dims][::2]
        formats = [torch.contiguous_format, torch.channels_last] if dims == 2 else [torch.contiguous_format]
        for (n, c, size), kernel, form in itertools.product(shapes, kernels, formats):
            if kernel <= 2 * max(size):
                padding, last = (kernel // 2,) * dims, form is not torch.contiguous_format
                ones = (1,) * dims
                yield Problem(n, c, size, (kernel,) * dims, ones, padding, dtype, "cpu", last), form


def calls(problem: Problem, form: torch.memory_format) -> Callable[[str, str], object]:
    """A function that runs one pass by one algorithm, on random tensors.

    PyTorch's own runs without the operator around it, as `ops.depthwise_conv` does where it chooses it.
    """

    def image(size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(problem.batch, problem.channels, *size, dtype=problem.dtype).contiguous(memory_format=form)

    p = problem
    x, grad = image(p.input_size), image(p.output_size)
    weight = torch.randn(p.channels, 1, *p.kernel_size, dtype=p.dtype)
    plain = dispatch.ALGORITHMS["pytorch"]
    sizes = (p.stride, p.padding)
    passes = {
        "output": (plain.output, depthwise_conv, (x, weight, None, *sizes)),
        "input": (plain.input, input_gradient, (grad, weight, p.input_size, *sizes)),
        "weight": (plain.weight, weight_gradient, (grad, x, p.kernel_size, *sizes)),
    }

    def run(name: str, pass_: str) -> object:
        bare, operator, args = passes[pass_]
        return bare(*args) if name == "pytorch" else operator(*args)

    return run


def affordable(name: str, problem: Problem) -> bool:
    """Whether an algorithm has a chance, and runs in a time that is worth waiting for."""
    pixels = math.prod(problem.input_size)
    if name == "gemm" and problem.channels * pixels**2 > MOST_GEMM_ELEMENTS:
        return False
    return problem.macs <= MOST_MACS.get(name, math.inf)


Measurements = dict[str, list[tuple[Problem, dict[str, float]]]]


def measure() -> Measurements:
    """Seconds of every algorithm, by cost key and problem."""
    table: Measurements = defaultdict(list)
    slow: set[tuple[object, ...]] = set()
    for problem, form in problems():
        start = time.perf_counter()
        run = calls(problem, form)
        for pass_ in PASSES:
            times = {}
            case = (dispatch.cost_key(pass_, problem), problem.batch, problem.channels, problem.input_size)
            for name, algorithm in dispatch.ALGORITHMS.items():
                if (name, *case) in slow or not affordable(name, problem) or algorithm.refusal(pass_, problem):
                    continue
                with ops.algorithm(name), torch.inference_mode():
                    times[name] = seconds(partial(run, name, pass_))
                if times[name] > SLOW_SECONDS:
                    slow.add((name, *case))
            table[dispatch.cost_key(pass_, problem)].append((problem, times))
        print(f"{time.perf_counter() - start:7.1f} s  {problem}", flush=True)
    return table


def samples(table: Measurements) -> Samples:
    """Features and seconds of every algorithm, by cost key."""
    result: Samples = {}
    for key, rows in table.items():
        pass_ = key.rsplit("/", 1)[1]
        result[key] = [({n: dispatch.ALGORITHMS[n].features(pass_, p) for n in times}, times) for p, times in rows]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, help="also write the features and seconds of every point")
    parser.add_argument("--output", type=Path, default=Path(ops.__file__).with_name("costs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record(samples(measure()), "python -m benchmarks.depthwise_fit", options.output, options.samples)


if __name__ == "__main__":
    main()
