"""How good the choice of an algorithm is: the chosen one's time over the best one's, before and after measuring.

    python -m benchmarks.speed.choice [--threads 2] [--batch-size 8] [--dtype float32] [--kernels 3 5 ...]

Depthwise convolutions of 9 maps with 8 kernels, in both layouts and all three passes. Every problem is measured three
times, as the engine measures it: the first time chooses among the engine's candidates, and the least times of the other
two judge all algorithms.
Writes choice.json, kernel by kernel; the summary is of all kernels that it holds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, machine, machine_file, new_parser, read_results, write_results
from timm_contconv.ops.algorithms import ALGORITHMS
from timm_contconv.ops.measure import measure
from timm_contconv.ops.prior import candidates
from timm_contconv.ops.problem import PASSES, Problem

MAPS = ((32, 112), (64, 112), (96, 56), (128, 56), (192, 28), (256, 28), (384, 14), (512, 14), (768, 7))
KERNELS = (3, 5, 7, 9, 13, 17, 23, 31)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def problems(kernel: int, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, Problem, tuple[Tensor | None, ...]]]:
    """Every pass of every problem, with its tensors."""
    for channels, size in MAPS:
        for form in LAYOUTS.values():
            x = torch.randn(batch, channels, size, size, dtype=dtype).contiguous(memory_format=form)
            weight, grad = torch.randn(channels, 1, kernel, kernel, dtype=dtype), torch.randn_like(x)
            problem = Problem.of(x.shape, weight.shape, (1, 1), (kernel // 2,) * 2, channels, x)
            for pass_, tensors in zip(PASSES, ((x, weight, None), (grad, weight), (grad, x)), strict=True):
                yield pass_, problem, tensors


def judged(pass_: str, problem: Problem, tensors: tuple[Tensor | None, ...]) -> dict[str, Any]:
    """The prior rule's algorithm, the measured one, and seconds of all."""
    able = candidates(pass_, problem)
    first, _ = measure(pass_, problem, tensors, able)
    able += [a for a in ALGORITHMS.values() if a not in able and not a.refusal(pass_, problem)]
    (seconds, _), (again, _) = (measure(pass_, problem, tensors, able) for _ in range(2))
    seconds = {name: min(time, again[name]) for name, time in seconds.items()}
    row = {"pass": pass_, "channels": problem.in_channels, "size": problem.input_size[0]}
    row |= {"kernel": problem.kernel_size[0], "layout": "channels-last" if problem.channels_last else "contiguous"}
    return {**row, "prior": able[0].name, "measured": min(first, key=first.__getitem__), "seconds": seconds}


def ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Times over that of the best: of the prior rule's algorithm, of the measured one, of PyTorch's own."""
    seconds = row["seconds"]
    chosen = {"prior": row["prior"], "measured": row["measured"], "pytorch": "pytorch"}
    return {name: seconds[algorithm] / min(seconds.values()) for name, algorithm in chosen.items()}


def show_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Print and return median, geometric mean and worst of the ratios, by pass and of all."""
    summary: dict[str, Any] = {}
    for name in ("prior", "measured", "pytorch"):
        for pass_ in (*PASSES, "all"):
            values = [ratios(row)[name] for row in rows if pass_ in (row["pass"], "all")]
            mean = math.exp(statistics.fmean(map(math.log, values)))
            found = {"median": statistics.median(values), "mean": mean, "worst": max(values), "count": len(values)}
            summary[f"{name}, {pass_}"] = found
            print(f"{name:9} {pass_:7} " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    return summary


def main() -> None:
    parser = new_parser(__doc__, machine_file("choice.json"), torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--kernels", type=int, nargs="+", default=KERNELS)
    options = arguments(parser)
    print(machine())
    settings = {"batch": options.batch_size, "dtype": options.dtype}
    before = read_results(options.output)
    if any(before.get(key, value) != value for key, value in settings.items()):
        parser.error(f"--output={options.output}: it holds results of another batch or dtype; name another file")
    rows = [row for row in before.get("rows", []) if row["kernel"] not in options.kernels]
    for kernel in options.kernels:
        for problem in problems(kernel, options.batch_size, getattr(torch, options.dtype)):
            rows.append(judged(*problem))
            found = ratios(rows[-1])
            if max(found["prior"], found["measured"]) > 1.25:
                print({**rows[-1], **found}, flush=True)
        write_results(options.output, {**settings, "rows": rows})
    write_results(options.output, {**settings, "summary": show_summary(rows), "rows": rows})


if __name__ == "__main__":
    main()
