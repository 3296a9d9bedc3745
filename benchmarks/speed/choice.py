"""How good the choice of an algorithm is: the chosen one's time over the best one's, before and after measuring.

    python -m benchmarks.speed.choice [--threads 2] [--batch-size 8] [--dtype float32]

Depthwise convolutions of 9 maps with 8 kernels, in both layouts and all three passes. Every problem is measured twice,
as the engine measures it: the first time chooses, the second time judges.
"""

import argparse
import math
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from timm_contconv.ops.measure import measure
from timm_contconv.ops.prior import candidates
from timm_contconv.ops.problem import PASSES, Problem
from timm_contconv.ops.record import record_of

MAPS = ((32, 112), (64, 112), (96, 56), (128, 56), (192, 28), (256, 28), (384, 14), (512, 14), (768, 7))
KERNELS = (3, 5, 7, 9, 13, 17, 23, 31)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def problems(batch: int, dtype: torch.dtype) -> Iterator[tuple[str, Problem, tuple[Tensor | None, ...]]]:
    """Every pass of every problem, with its tensors."""
    for channels, size in MAPS:
        for kernel in KERNELS:
            for form in LAYOUTS.values():
                x = torch.randn(batch, channels, size, size, dtype=dtype).contiguous(memory_format=form)
                weight, grad = torch.randn(channels, 1, kernel, kernel, dtype=dtype), torch.randn_like(x)
                problem = Problem.of(x.shape, weight.shape, (1, 1), (kernel // 2,) * 2, channels, x)
                for pass_, tensors in zip(PASSES, ((x, weight, None), (grad, weight), (grad, x)), strict=True):
                    yield pass_, problem, tensors


def ratios(pass_: str, problem: Problem, tensors: tuple[Tensor | None, ...]) -> dict[str, float]:
    """Times over that of the best: of the prior rule's algorithm, of the measured one, of PyTorch's own."""
    able = candidates(pass_, problem)
    first, judge = (measure(pass_, problem, tensors, able)[0] for _ in range(2))
    best = min(judge.values())
    chosen = min(first, key=first.__getitem__)
    seconds = {"prior": judge[able[0].name], "measured": judge[chosen], "pytorch": judge["pytorch"]}
    return {name: t / best for name, t in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(record_of(torch.device("cpu")).fingerprint)
    found: dict[str, list[dict[str, float]]] = {pass_: [] for pass_ in PASSES}
    for pass_, problem, tensors in problems(options.batch_size, getattr(torch, options.dtype)):
        row = ratios(pass_, problem, tensors)
        found[pass_].append(row)
        if max(row["prior"], row["measured"]) > 1.25:
            print(f"{pass_:7} {problem}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
    for name in ("prior", "measured", "pytorch"):
        for pass_, rows in found.items():
            values = [row[name] for row in rows]
            mean = math.exp(statistics.fmean(map(math.log, values)))
            print(
                f"{name:9} {pass_:7} median {statistics.median(values):.2f}  mean {mean:.2f}  worst {max(values):.2f}"
            )


if __name__ == "__main__":
    main()
