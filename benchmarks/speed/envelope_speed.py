"""resnet50 with the Gaussian envelope against plain resnet50: inference and training step, as ratios.

    python -m benchmarks.speed.envelope_speed [--rounds 15] [--threads 2] [--output FILE]

Channels last, batch 8, 224 pixels, float32. A figure is the median over rounds of the ratio to plain resnet50 in the
same round, with the quartiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import timm
import torch
from torch import nn

import timm_contconv as tcc
from benchmarks.common import (
    arguments,
    in_turns,
    infer,
    machine,
    machine_file,
    medians,
    new_parser,
    ratio,
    training_step,
    write_results,
)

BATCH, SIZE = 8, 224


def models() -> dict[str, nn.Module]:
    """What is compared, the baseline first."""
    enveloped = timm.create_model("resnet50_genv")
    built = {
        "resnet50": timm.create_model("resnet50"),
        "resnet50_genv": enveloped,
        "resnet50_genv, k_g 3 at inference": timm.create_model("resnet50_genv", patch_args={"inference_size": 3}),
        "resnet50_genv, merged": tcc.merge(enveloped),
    }
    return {name: model.to(memory_format=torch.channels_last) for name, model in built.items()}


def compare(work: str, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Print and return milliseconds and ratios to the first contender."""
    print(work)
    seconds = in_turns(calls, rounds, work)
    baseline = next(iter(seconds.values()))
    results = {}
    for name, middle in medians(seconds).items():
        found = results[name] = {"milliseconds": 1000 * middle, **ratio(seconds[name], baseline)}
        quartiles = f"({found['quartile_1']:.3f} to {found['quartile_3']:.3f})"
        print(f"  {name:36s} {1000 * middle:7.0f} ms   x {found['ratio']:.3f}   {quartiles}", flush=True)
    return results


def main() -> None:
    parser = new_parser(__doc__, machine_file("envelope_speed.json"), threads=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = arguments(parser)
    print(f"{machine()}; {options.rounds} rounds, {BATCH} images of {SIZE} pixels")
    contenders = models()
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    inference = {name: functools.partial(infer, model, images) for name, model in contenders.items()}
    results = {"inference": compare("inference", inference, options.rounds)}
    steps = {name: training_step(contenders[name], images) for name in ("resnet50", "resnet50_genv")}
    results["training step"] = compare("training step", steps, options.rounds)
    write_results(options.output, {"rounds": options.rounds, **results})


if __name__ == "__main__":
    main()
