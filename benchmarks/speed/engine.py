"""Whole models with the recipe `engine`: training step and inference, against the same models without it.

    python -m benchmarks.speed.engine [--models NAME ...] [--works WORK ...] [--rounds 9] [--batch 8] [--size 224]

Plain timm models in both layouts, and merged models with constructed kernels against patched ones. Contenders take
turns within one run. The inference of plain models is also timed without what both share: only the layers that `engine`
exchanges, while the whole model runs. Prints ratios, and writes engine.json, model by model.
"""

from __future__ import annotations

import copy
import time
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
WORKS = ("inference", "training step")
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


class Stopwatch:
    """Sums up the seconds of the depthwise layers that `engine` exchanges, forward by forward."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.seconds: list[float] = []
        self._start = 0.0
        model.register_forward_pre_hook(lambda *_: self.seconds.append(0.0))
        for name in names:
            layer = model.get_submodule(name)
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds[-1] += time.perf_counter() - self._start


def exchanged(models: dict[str, nn.Module]) -> list[str]:
    """Names of the layers in which the contenders differ."""
    first, second = (dict(model.named_modules()) for model in models.values())
    return [name for name, layer in first.items() if type(layer) is not type(second[name])]


def step_of(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    step = training_step(model, images)

    def run() -> None:
        model.train()
        step()

    return run


def measure(name: str, chosen: list[str], images: torch.Tensor, rounds: int) -> dict[str, object]:
    """Seconds and ratios of one model, by work and layout."""
    models, record = contenders(name), {}
    watches = {key: Stopwatch(model, exchanged(models)) for key, model in models.items() if name in PLAIN}
    for layout, form in LAYOUTS.items():
        x = images.to(memory_format=form)
        calls = {key: works(name, model.to(memory_format=form), x) for key, model in models.items()}
        first, second = calls
        for work in (w for w in calls[first] if w in chosen):
            turns = {key: of[work] for key, of in calls.items()}
            times = {f"{work}, {layout}": in_turns(turns, rounds, f"{name}, {layout}, {work}")}
            if watches and work == "inference":
                alone = {key: watch.seconds[-rounds:] for key, watch in watches.items()}
                times[f"exchanged layers, {work}, {layout}"] = alone
            for what, seconds in times.items():
                found = ratio(seconds[first], seconds[second])
                record[what] = {"seconds": medians(seconds), f"{first} / engine": found}
                print(f"{name:26s} {what:42s} {first} / engine: {found['ratio']:.3f}", medians(seconds), flush=True)
    return record


def main() -> None:
    parser = new_parser(__doc__, machine_file("engine.json"), torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=[*PLAIN, *PATCHED])
    parser.add_argument("--works", nargs="+", default=WORKS, choices=WORKS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = arguments(parser)
    print(machine())
    images = torch.randn(options.batch, 3, options.size, options.size)
    for name in options.models:
        record = measure(name, options.works, images, options.rounds)
        before = read_results(options.output)
        write_results(options.output, {**before, "batch": options.batch, name: {**before.get(name, {}), **record}})


if __name__ == "__main__":
    main()
