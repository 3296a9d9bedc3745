"""Fits the cost rule of the depthwise convolution to this machine, and writes timm_contconv/ops/costs.json.

    python -m benchmarks.depthwise_fit [--output FILE] [--samples FILE]

Every algorithm runs every pass at a grid of shapes. The seconds of a pass are modelled as a sum of amounts of work
(`Algorithm.features`), each with a non-negative coefficient, fitted to the relative error. What counts is not
how well the seconds are predicted but the regret: the time of the algorithm that the rule picks over the time of
the fastest one. It is printed and recorded.

One thread is used, so that other work on the machine disturbs less: all algorithms share the cores alike, so the
order of their times hardly depends on the number of threads.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls

from timm_contconv import ops
from timm_contconv.ops import dispatch
from timm_contconv.ops.dense import dense_cost_key, dense_features
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
# (batch, channels in, channels out, size) of convolutions between channels
DENSE_SHAPES = {
    1: [(2, 16, 16, (1024,)), (1, 8, 32, (4096,)), (4, 32, 32, (256,))],
    2: [(2, 24, 24, (32, 32)), (4, 8, 24, (16, 16)), (1, 3, 32, (32, 32))],
    3: [(1, 4, 8, (16, 16, 16))],
}
DENSE_KERNELS = {1: [65, 129, 255, 1023, 4095], 2: [9, 15, 21, 33], 3: [5, 9, 15]}
KERNELS = {1: [3, 31, 127, 511, 4095, 15999], 2: [3, 5, 7, 13, 17, 23, 35], 3: [3, 5, 9]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A slower convolution than this (in multiply-adds, products with the padding included) is not waited for.
MOST_MACS = {"pytorch": 6e8, "channels_last": 1e9, "direct": 2e9}
MOST_GEMM_ELEMENTS = 2e7
MOST_DENSE_MACS = 1e9
SECONDS_PER_POINT = 0.03
FEWEST_POINTS = 3
# An algorithm that took longer than this is not asked again at larger kernels.
SLOW_SECONDS = 0.15


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


def seconds(fn: Callable[[], object]) -> float:
    """Least time of a call, over the repeats that fit in SECONDS_PER_POINT (seven to twenty; one if slow).

    The least and not the median, so that other work on the machine does not enter the rule.
    """
    fn()
    start = time.perf_counter()
    fn()
    once = time.perf_counter() - start
    if once > SLOW_SECONDS:
        return once
    times = []
    for _ in range(max(7, min(20, int(SECONDS_PER_POINT / max(once, 1e-6))))):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


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


def measure_dense() -> dict[str, list[tuple[tuple[object, ...], dict[str, float]]]]:
    """Seconds of forward and backward of convolutions between channels, by cost key and shapes."""
    table = defaultdict(list)
    for dims, shapes in DENSE_SHAPES.items():
        for (n, c_in, c_out, size), kernel in itertools.product(shapes, DENSE_KERNELS[dims]):
            ones, padding = (1,) * dims, (kernel // 2,) * dims
            x = torch.randn(n, c_in, *size, requires_grad=True)
            weight = torch.randn(c_out, c_in, *(kernel,) * dims, requires_grad=True)
            plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
            variants = {
                "pytorch": lambda f=plain, x=x, w=weight, p=padding: f(x, w, None, 1, p).sum().backward(),
                "fft": lambda x=x, w=weight, p=padding: ops.fft_conv(x, w, None, 1, p).sum().backward(),
            }
            if x.numel() * c_out * kernel**dims > MOST_DENSE_MACS:
                continue
            times = {name: seconds(variant) for name, variant in variants.items()}
            table[dense_cost_key(dims)].append(((tuple(x.shape), tuple(weight.shape), ones, padding, 1), times))
    return table


def coefficients(points: list[tuple[tuple[float, ...], float]]) -> list[float]:
    """Non-negative seconds per unit of each feature, by least squares of the relative error."""
    features = np.array([f for f, _ in points])
    measured = np.array([t for _, t in points])
    scale = np.maximum(features.max(axis=0), 1e-300)
    solution, _ = nnls(features / scale / measured[:, None], np.ones(len(points)))
    return [float(f"{c:.4g}") for c in solution / scale]


Samples = dict[str, list[tuple[dict[str, tuple[float, ...]], dict[str, float]]]]


def samples(table: Measurements, dense: dict[str, list[tuple[tuple, dict[str, float]]]]) -> Samples:
    """Features and seconds of every algorithm, by cost key."""
    result: Samples = {}
    for key, rows in table.items():
        pass_ = key.rsplit("/", 1)[1]
        result[key] = [({n: dispatch.ALGORITHMS[n].features(pass_, p) for n in times}, times) for p, times in rows]
    for key, shaped in dense.items():
        result[key] = [({n: dense_features(n, *shapes) for n in times}, times) for shapes, times in shaped]
    return result


def fit(data: Samples) -> dict[str, dict[str, list[float]]]:
    """Coefficients by cost key and algorithm."""
    result: dict[str, dict[str, list[float]]] = {}
    for key, rows in data.items():
        names = sorted({name for _, times in rows for name in times})
        points = {name: [(f[name], t[name]) for f, t in rows if name in t] for name in names}
        result[key] = {name: coefficients(p) for name, p in points.items() if len(p) >= FEWEST_POINTS}
    return result


def regrets(data: Samples, costs: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Mean and worst time of the rule's choice over the fastest, by cost key."""
    result = {}
    for key, rows in data.items():
        ratios = []
        for features, times in rows:
            expected = {n: float(np.dot(costs[key][n], f)) for n, f in features.items() if n in costs[key]}
            ratios.append(times[min(expected, key=expected.__getitem__)] / min(times.values()))
        result[key] = {"mean": round(statistics.mean(ratios), 3), "worst": round(max(ratios), 3)}
    return result


def processor() -> str:
    """The processor's name and the number of threads."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(ops.__file__).with_name("costs.json")
    parser.add_argument("--samples", type=Path, help="also write the features and seconds of every point")
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = samples(measure(), measure_dense())
    if options.samples:
        options.samples.write_text(json.dumps(data), encoding="utf-8")
    costs = fit(data)
    regret = regrets(data, costs)
    for key, row in regret.items():
        print(f"{key:45} regret mean {row['mean']:.3f} worst {row['worst']:.3f}")
    record = {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": "python -m benchmarks.depthwise_fit",
        "regret": regret,
        "seconds": costs,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
