"""convnext_tiny with DCLS against the plain model and against the authors' package in the same model.

    python -m benchmarks.speed.convnext [--repeats 5] [--batch 8] [--size 224] [--parts PART ...] [--threads N]

Prints ratios measured in one run (medians of turns): kernel construction, training step (eager and compiled),
inference, peak memory of a step, and growth with kernel size and count. The package is so much slower that it takes no
turns: its models run a fifth as often, after the others. Writes convnext.json and convnext.png, part by part.
"""

from __future__ import annotations

import argparse
import functools
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from DCLS.construct.modules import Dcls2d
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.common import (
    ROOT,
    arguments,
    in_turns,
    infer,
    machine,
    machine_file,
    medians,
    new_parser,
    read_results,
    write_results,
)
from timm_contconv.layers import DclsConv2d

OURS, PLAIN, PACKAGE, DENSE = "timm_contconv", "plain 7x7", "DCLS package", "dense nn.Conv2d 23x23"
BILINEAR = "timm_contconv, bilinear 17x17"
MODELS = {OURS: "convnext_tiny_dcls_gauss", BILINEAR: "convnext_tiny_dcls", PLAIN: "convnext_tiny"}
PARTS = {
    "construction": ("construction, C=384, K=23, m=26, forward + backward", "ms"),
    "training step": ("training step", "s"),
    "compiled training step": ("training step under torch.compile", "s"),
    "inference": ("inference", "s"),
    "peak memory": ("memory that a training step adds at its peak", "MiB"),
    "growth": ("one layer by kernel size and count", "ms"),
}
KERNEL_SIZES = (7, 11, 17, 23, 31, 41, 51)
KERNEL_COUNTS = (5, 10, 20, 26, 34, 50)


def package_layer(channels: int, size: int, count: int) -> Dcls2d:
    """The authors' layer, as their training code uses it."""
    return Dcls2d(
        channels, channels, count, padding=size // 2, dilated_kernel_size=size, groups=channels, version="gauss"
    )


def build(contender: str) -> nn.Module:
    """convnext_tiny, with 23x23 / 26 Gauss kernels where the contender has no others."""
    torch.manual_seed(0)
    model = timm.create_model(MODELS.get(contender, MODELS[OURS]))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, DclsConv2d) and contender in (DENSE, PACKAGE):
            channels, size, count = layer.out_channels, layer.kernel_size[0], layer.kernel.kernel_count
            dense = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
            model.set_submodule(name, dense if contender == DENSE else package_layer(channels, size, count))
    return model


def train_step(model: nn.Module, images: Tensor) -> None:
    model.train()
    model.zero_grad()
    model(images).logsumexp(1).sum().backward()


def construct(layer: nn.Module, upstream: Tensor) -> None:
    """Construction, forward and backward."""
    layer.zero_grad()
    kernel = layer.weight if isinstance(layer, DclsConv2d) else layer.DCK(layer.weight, layer.P, layer.SIG)
    kernel.backward(upstream)


def layer_step(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    layer(x).sum().backward()


def measure_construction(repeats: int) -> dict[str, float]:
    """Milliseconds for C=384, K=23, m=26."""
    upstream = torch.randn(384, 1, 23, 23)
    our_layer = functools.partial(DclsConv2d, 384, 384, 23, groups=384, kernel_count=26)
    layers = {
        "eager": our_layer(compile=False),
        "compiled": our_layer(compile=True),
        PACKAGE: package_layer(384, 23, 26),
    }
    calls = {name: functools.partial(construct, layer, upstream) for name, layer in layers.items()}
    return {name: 1000 * s for name, s in medians(in_turns(calls, 2 * repeats, "construction")).items()}


def measure_models(work: Callable[[nn.Module, Tensor], None], images: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of the whole model."""
    seconds: dict[str, float] = {}
    for names, rounds in (((*MODELS, DENSE), repeats), ((PACKAGE,), max(1, repeats // 5))):
        calls = {name: functools.partial(work, build(name), images) for name in names}
        seconds |= medians(in_turns(calls, rounds, work.__name__))
    return seconds


def measure_compiled(images: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of a training step of compiled models."""
    models = {name: build(name) for name in (OURS, PLAIN)}
    for model in models.values():
        model.compile()
    calls = {name: functools.partial(train_step, model, images) for name, model in models.items()}
    return medians(in_turns(calls, repeats, "compiled"))


def measure_growth(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of one layer's training step (192 channels, 28 x 28, batch 4) by kernel size and by count."""
    x = torch.randn(4, 192, 28, 28, requires_grad=True)
    growth: dict[str, dict[str, list[float]]] = {"size": {OURS: [], PACKAGE: []}, "count": {OURS: [], PACKAGE: []}}
    cases = [("size", k, 26) for k in KERNEL_SIZES] + [("count", 23, m) for m in KERNEL_COUNTS]
    for axis, size, count in cases:
        ours = DclsConv2d(192, 192, size, padding=size // 2, groups=192, kernel_count=count)
        layers = {OURS: ours, PACKAGE: package_layer(192, size, count)}
        calls = {name: functools.partial(layer_step, layer, x) for name, layer in layers.items()}
        for name, seconds in medians(in_turns(calls, repeats, f"size {size}, count {count}")).items():
            growth[axis][name].append(1000 * seconds)
    return growth


def peak_memory(contender: str, batch: int, size: int) -> float:
    """MiB that a training step adds to a process that holds the model, measured in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--memory-of", contender]
    command += ["--batch", str(batch), "--size", str(size), "--threads", str(torch.get_num_threads())]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(output.stdout.splitlines()[-1])


def print_memory(contender: str, images: Tensor) -> None:
    model = build(contender)
    train_step(model, images[:1, :, :64, :64])  # what is loaded and allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmHWM")
    train_step(model, images)
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(part: str, images: Tensor, repeats: int) -> dict[str, Any]:
    """The figures of one part, all of one run."""
    if part == "construction":
        return measure_construction(repeats)
    if part == "training step":
        return measure_models(train_step, images, repeats)
    if part == "compiled training step":
        return measure_compiled(images, repeats)
    if part == "inference":
        return measure_models(infer, images, repeats)
    if part == "peak memory":
        return {name: peak_memory(name, len(images), images.shape[-1]) for name in (OURS, PLAIN, DENSE, PACKAGE)}
    return measure_growth(repeats)


def print_ratios(part: str, figures: dict[str, float]) -> None:
    title, unit = PARTS[part]
    ours = "eager" if part == "construction" else OURS
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:24s} {value:10.2f} {unit}   {value / figures[ours]:7.2f} x {ours}")


def plot(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    bars, sizes, counts = figure.subplots(1, 3)
    works = ("training step", "inference")
    for offset, name in enumerate((PLAIN, BILINEAR, OURS, DENSE, PACKAGE)):
        values = [results[work][name] / results[work][PLAIN] for work in works]
        bars.bar([i + 0.17 * offset for i in range(len(works))], values, 0.15, label=name)
    bars.set_xticks([i + 0.34 for i in range(len(works))], works)
    bars.set_ylabel("time / plain 7x7 model")
    bars.set_yscale("log")
    bars.set_ylim(0.8, 200)  # room for the legend above the bars
    bars.legend(fontsize=7, loc="upper left")
    for axis, key, values in ((sizes, "size", KERNEL_SIZES), (counts, "count", KERNEL_COUNTS)):
        for name, milliseconds in results["growth"][key].items():
            axis.plot(values, milliseconds, "o-", label=name)
        axis.set_xlabel(f"kernel {key}")
        axis.set_ylabel("ms, one layer, forward + backward")
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = new_parser(__doc__, machine_file("convnext.json"), torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = arguments(parser)
    logging.disable(logging.WARNING)  # the package warns, for every layer, that it found no CUDA extension
    images = torch.randn(options.batch, 3, options.size, options.size)
    if options.memory_of:
        print_memory(options.memory_of, images)
        return
    print(machine())
    for part in options.parts:
        figures = measure(part, images, options.repeats)
        if part != "growth":
            print_ratios(part, figures)
        settings = {"batch": options.batch, "image size": options.size}
        write_results(options.output, {**read_results(options.output), **settings, part: figures})
    results = read_results(options.output)
    if {"training step", "inference", "growth"} <= set(results):
        plot(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
