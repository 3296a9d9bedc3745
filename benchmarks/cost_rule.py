"""Fitting the cost rules of the convolution engine: seconds as sums of amounts of work.

The seconds of an algorithm are modelled as a sum of amounts of work, each with a non-negative coefficient, fitted to
the relative error. What counts is not how well the seconds are predicted but the regret: the time of the algorithm
that the rule picks over the time of the fastest one. It is printed and recorded.

One thread is used, so that other work on the machine disturbs less: all algorithms share the cores alike, so the
order of their times hardly depends on the number of threads.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

__all__ = ["SLOW_SECONDS", "Samples", "record", "seconds"]

SECONDS_PER_POINT = 0.03
FEWEST_POINTS = 3
# An algorithm that took longer than this is not asked again at larger kernels.
SLOW_SECONDS = 0.15

#: (amounts of work of every algorithm, its seconds) of every problem, by cost key
Samples = dict[str, list[tuple[dict[str, tuple[float, ...]], dict[str, float]]]]


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


def coefficients(points: list[tuple[tuple[float, ...], float]]) -> list[float]:
    """Non-negative seconds per unit of each feature, by least squares of the relative error."""
    features = np.array([f for f, _ in points])
    measured = np.array([t for _, t in points])
    scale = np.maximum(features.max(axis=0), 1e-300)
    solution, _ = nnls(features / scale / measured[:, None], np.ones(len(points)))
    return [float(f"{c:.4g}") for c in solution / scale]


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


def record(data: Samples, command: str, output: Path, samples: Path | None) -> None:
    """Fit the rule, print its regrets, and write it to `output`; the measurements to `samples`."""
    if samples:
        samples.write_text(json.dumps(data), encoding="utf-8")
    costs = fit(data)
    regret = regrets(data, costs)
    for key, row in regret.items():
        print(f"{key:45} regret mean {row['mean']:.3f} worst {row['worst']:.3f}")
    result = {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": command,
        "regret": regret,
        "seconds": costs,
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
