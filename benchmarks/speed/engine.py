"""Whole models with the recipe `engine`: training step and inference, against the same models without it.

    python -m benchmarks.speed.engine [--models NAME ...] [--rounds 5] [--batch 8] [--size 224] [--threads N]

Plain timm models in both layouts, and merged models with constructed kernels against patched ones. Contenders take
turns within one run. Prints ratios, and writes engine.json, model by model.
"""

from __future__ import annotations

import copy
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
    read_results,
    training_step,
    write_results,
)

PLAIN = ("convnext_tiny", "convformer_s18", "efficientnet_b0")
PATCHED = ("convnext_tiny_dcls_gauss", "convnext_tiny_smp")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def contenders(name: str) -> dict[str, nn.Module]:
    """A plain model and the same with `engine`; or a patched one, and its merged form with `engine`."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    if name in PATCHED:
        return {"patched": model, "engine": tcc.patch(tcc.merge(model), "engine")}
    return {"plain": model, "engine": tcc.patch(copy.deepcopy(model), "engine")}


def works(name: str, model: nn.Module, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of a contender; merged models are for inference."""
    inference = {"inference": lambda: infer(model, images)}
    return inference if name in PATCHED else {**inference, "training step": step_of(model, images)}


def step_of(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    step = training_step(model, images)

    def run() -> None:
        model.train()
        step()

    return run


def main() -> None:
    parser = new_parser(__doc__, machine_file("engine.json"), torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=[*PLAIN, *PATCHED])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = arguments(parser)
    print(machine())
    for name in options.models:
        models, record = contenders(name), {}
        for layout, form in LAYOUTS.items():
            images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=form)
            calls = {key: works(name, model.to(memory_format=form), images) for key, model in models.items()}
            first, second = calls
            for work in calls[first]:
                turns = {key: of[work] for key, of in calls.items()}
                times = in_turns(turns, options.rounds, f"{name}, {layout}, {work}")
                found = ratio(times[first], times[second])
                record[f"{work}, {layout}"] = {"seconds": medians(times), f"{first} / engine": found}
                print(
                    f"{name:26s} {work:13s} {layout:14s} {first} / engine: {found['ratio']:.3f}",
                    medians(times),
                    flush=True,
                )
        write_results(options.output, {**read_results(options.output), "batch": options.batch, name: record})


if __name__ == "__main__":
    main()
