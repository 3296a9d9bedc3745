"""CC layers against a plain strided convolution, and against building the weights: time and memory, as ratios.

    python -m benchmarks.speed.cc_speed [--rounds 31] [--threads 2] [--output FILE]

Float32. Scale 1/2 is compared with `nn.Conv2d` of stride 2, for several sizes, and `resnet50_cc` with `resnet50`. Scale
0.61, with 64 to 64 channels, 28 x 28 pixels, batch 4, is compared with the paper's formulation, which builds the
weights of all output pixels. A time is the median over rounds of the ratio in the same round, with the quartiles. With
one thread it is processor time, which other work on the machine does not lengthen. Memory is the peak of what is
allocated beyond the inputs and parameters, from the profiler.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import arguments, in_turns, machine, machine_file, medians, new_parser, ratio, write_results
from timm_contconv.layers import ContinuousConv2d
from timm_contconv.layers.cc.grid import distances, neighbours

CHANNELS, SIZE, BATCH = 64, 28, 4
#: channels, size and batch at scale 1/2
HALVED = ((64, 28, 4), (64, 56, 4), (64, 56, 32), (128, 28, 8), (256, 14, 32))
SCALE = 0.61
#: support and hidden layers of the internal net at scale 0.61
NETS: dict[str, dict[str, Any]] = {
    "support 4, interpolating net (16 features)": {"kernel_size": 4},
    "support 4, hidden (64, 64)": {"kernel_size": 4, "hidden": (64, 64)},
    "support 3, interpolating net (9 features)": {"kernel_size": 3},
}
Module = Callable[[Tensor], Tensor]


def with_weights_built(layer: ContinuousConv2d, x: Tensor) -> Tensor:
    """The paper's Blocks 2 to 4 for one group: neighbours, weights of all output pixels, their product (Eq. 3)."""
    axes = layer.plan(x.shape[-2:]).axes
    weights = layer.kernel_at(*(distances(axis, 0, axis.out_size) for axis in axes))
    margin = 2 * max(layer.kernel_size)
    rows, columns = (neighbours(axis, 0, axis.out_size) + margin for axis in axes)
    near = F.pad(x, (margin,) * 4)[:, :, rows][..., columns]
    y = torch.einsum("nchiwj,hwocij->nohw", near, weights)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


def infer(module: Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def train(module: Module, x: Tensor) -> None:
    module(x.detach().requires_grad_()).sum().backward()


WORKS = {"inference": infer, "training": train}


def compare(slow: Callable[[], None], quick: Callable[[], None], rounds: int, calls: int = 1) -> dict[str, float]:
    """Median and quartiles of slow / quick, so many calls of each in turns, and the medians in milliseconds."""

    def repeat(call: Callable[[], None]) -> None:
        for _ in range(calls):
            call()

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    contenders = {"first": functools.partial(repeat, slow), "second": functools.partial(repeat, quick)}
    seconds = in_turns(contenders, rounds, clock=clock)
    times = {f"{name}_ms": 1000 * value / calls for name, value in medians(seconds).items()}
    return {**ratio(seconds["first"], seconds["second"]), **times}


def peak_bytes(call: Callable[[], None]) -> int:
    """The most that a call holds at once, beyond what was there before."""
    call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def against_plain(
    work: Callable[..., None], layer: nn.Module, plain: nn.Module, x: Tensor, rounds: int, calls: int = 1
) -> dict[str, float]:
    """A CC layer or model relative to a plain one."""
    for module in (layer, plain):
        module.train(work is train)
    return compare(lambda: work(layer, x), lambda: work(plain, x), rounds, calls)


def show(name: str, row: dict[str, float], peer: str) -> dict[str, float]:
    """Print a ratio with its quartiles."""
    quartiles = f"({row['quartile_1']:.3f} to {row['quartile_3']:.3f})"
    print(f"{name}: {row['ratio']:.3f} {quartiles} x {peer}, {row['second_ms']:.2f} ms", flush=True)
    return row


def anywhere(name: str, work: Callable[..., None], net: dict[str, Any], rounds: int) -> dict[str, float]:
    """Print and return building the weights relative to the layer at scale 0.61: time and peak memory."""
    layer, limited = (
        ContinuousConv2d(CHANNELS, CHANNELS, scale=SCALE, memory_limit=limit, **net).train(work is train)
        for limit in (None, 2**21)
    )
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    torch.testing.assert_close(layer(x), with_weights_built(layer, x), rtol=1e-4, atol=1e-4)
    built, ours = (lambda: work(lambda x: with_weights_built(layer, x), x)), (lambda: work(layer, x))
    row = compare(built, ours, rounds)
    memory = {"built": peak_bytes(built), "ours": peak_bytes(ours), "limited": peak_bytes(lambda: work(limited, x))}
    row |= {f"{kind}_megabytes": value / 2**20 for kind, value in memory.items()}
    row |= {
        "memory_ratio": memory["built"] / memory["ours"],
        "limited_memory_ratio": memory["built"] / memory["limited"],
    }
    row["limited_slowdown"] = compare(lambda: work(limited, x), ours, rounds)["ratio"]
    print(
        f"{name}: {row['ratio']:.1f} ({row['quartile_1']:.1f} to {row['quartile_3']:.1f}) times faster than building"
        f" the weights, {row['second_ms']:.1f} ms; memory {row['built_megabytes']:.1f} / {row['ours_megabytes']:.1f} MB"
        f" = {row['memory_ratio']:.0f}; with memory_limit 2 MiB {row['limited_megabytes']:.1f} MB ="
        f" {row['limited_memory_ratio']:.0f}, {row['limited_slowdown']:.2f} x the time",
        flush=True,
    )
    return row


def main() -> None:
    parser = new_parser(__doc__, machine_file("cc_speed.json"), threads=2)
    parser.add_argument("--rounds", type=int, default=31)
    options = arguments(parser)
    print(machine())
    results: dict[str, dict[str, float]] = {}
    for name, work in WORKS.items():
        for channels, size, batch in HALVED:
            layer, plain = ContinuousConv2d(channels, channels, 3, 2), nn.Conv2d(channels, channels, 3, 2, 1)
            x, calls = torch.randn(batch, channels, size, size), 10 if batch < 32 else 1
            key = f"scale 1/2, {channels} channels, {size} x {size}, batch {batch}, {name}"
            results[key] = show(key, against_plain(work, layer, plain, x, options.rounds, calls), "nn.Conv2d")
        models = [timm.create_model(model) for model in ("resnet50_cc", "resnet50")]
        row = against_plain(work, *models, torch.randn(4, 3, 224, 224), max(options.rounds // 4, 3))
        key = f"resnet50_cc, batch 4, {name}"
        results[key] = show(key, row, "resnet50")
    for net, settings in NETS.items():
        for name, work in WORKS.items():
            key = f"scale {SCALE}, {net}, {name}"
            results[key] = anywhere(key, work, settings, options.rounds)
    write_results(options.output, {"rounds": options.rounds, **results})


if __name__ == "__main__":
    main()
