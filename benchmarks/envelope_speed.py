"""resnet50 with the Gaussian envelope against plain resnet50: inference and training step, as ratios.

    python -m benchmarks.envelope_speed [--rounds 15] [--threads 2] [--output benchmarks/results/envelope_speed.json]

Channels last, batch 8, 224 pixels, float32. The models take turns within each round, so that whatever else the
machine does meets them alike; a figure is the median over rounds of the ratio to plain resnet50 in the same round,
with the quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_contconv
from benchmarks.timing import machine

BATCH, SIZE = 8, 224


def models() -> dict[str, nn.Module]:
    """What is compared, the baseline first."""
    torch.manual_seed(0)
    enveloped = timm.create_model("resnet50_genv")
    small = timm.create_model("resnet50_genv", patch_args={"inference_size": 3})
    built = {
        "resnet50": timm.create_model("resnet50"),
        "resnet50_genv": enveloped,
        "resnet50_genv, k_g 3 at inference": small,
        "resnet50_genv, merged": timm_contconv.merge(enveloped),
    }
    return {name: model.to(memory_format=torch.channels_last) for name, model in built.items()}


def infer(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def train_step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    model(images).logsumexp(1).sum().backward()


def compare(
    work: Callable[[nn.Module, Tensor], None], contenders: dict[str, nn.Module], rounds: int
) -> dict[str, dict[str, float]]:
    """Print and return milliseconds and ratios to the first contender."""
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, model in contenders.items():
            start = time.perf_counter()
            work(model, images)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    baseline = next(iter(seconds.values()))
    results = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, baseline, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = 1000 * statistics.median(values)
        results[name] = {"milliseconds": milliseconds, "ratio": middle, "quartile_1": low, "quartile_3": high}
        print(f"  {name:36s} {milliseconds:7.0f} ms   x {middle:.3f}   ({low:.3f} to {high:.3f})", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contenders = models()
    results: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds}
    print(f"{results['machine']}; {arguments.rounds} rounds, {BATCH} images of {SIZE} pixels")
    print("inference")
    results["inference"] = compare(infer, {name: model.eval() for name, model in contenders.items()}, arguments.rounds)
    print("training step (forward and backward)")
    trained = {name: contenders[name].train() for name in ("resnet50", "resnet50_genv")}
    results["training step"] = compare(train_step, trained, arguments.rounds)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
