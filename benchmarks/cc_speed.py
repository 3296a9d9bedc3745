"""CC layers against a plain strided convolution, and against building the weights: time and memory, as ratios.

    python -m benchmarks.cc_speed [--rounds 31] [--threads 2] [--output benchmarks/results/cc_speed.json]

Float32. Scale 1/2 is compared with `nn.Conv2d` of stride 2, for several sizes, and `resnet50_cc` with `resnet50`; scale
0.61, with 64 to 64 channels, 28 x 28 pixels, batch 4, with the paper's formulation, which builds the weights of all
output pixels. Calls take turns within each round; a time is
the median over rounds of the ratio in the same round, with the quartiles; with one thread it is processor time, which
other work on the machine does not lengthen. Memory is the peak of what is allocated
beyond the inputs and parameters, from the profiler.
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
from torch.nn import functional as F

from benchmarks.timing import machine
from timm_contconv.layers import ContinuousConv2d
from timm_contconv.layers.cc_grid import distances

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


def with_weights_built(layer: ContinuousConv2d, x: Tensor) -> Tensor:
    """The paper's Blocks 2 to 4 for one group: neighbours, weights of all output pixels, their product (Eq. 3)."""
    rows, columns = layer.plan(x.shape[-2:]).axes
    first_row, row_distances = distances(rows, 0, rows.out_size, x.device)
    first_column, column_distances = distances(columns, 0, columns.out_size, x.device)
    features = layer.features(row_distances.flatten(), column_distances.flatten())
    weights = F.linear(features, layer.internal_weight.flatten(0, 1))
    weights = weights.view(*row_distances.shape, *column_distances.shape, layer.out_channels, layer.in_channels)
    margin = 2 * max(layer.kernel_size)
    taps = [torch.arange(size) + margin for size in layer.kernel_size]
    padded = F.pad(x, (margin,) * 4)
    neighbours = padded[:, :, first_row[:, None] + taps[0]][..., first_column[:, None] + taps[1]]
    y = torch.einsum("nchiwj,hiwjoc->nohw", neighbours, weights)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


def infer(module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def train(module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    module(x.detach().requires_grad_()).sum().backward()


def ratios(slow: Callable[[], None], quick: Callable[[], None], rounds: int, calls: int = 1) -> dict[str, float]:
    """Median and quartiles of slow / quick, so many calls of each in turns, and the medians in milliseconds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for call, values in zip((slow, quick), seconds, strict=True):
            start = clock()
            for _ in range(calls):
                call()
            if turn:  # the first round warms up
                values.append((clock() - start) / calls)
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*seconds, strict=True)], n=4)
    slow_ms, quick_ms = (1000 * statistics.median(values) for values in seconds)
    return {"ratio": middle, "quartile_1": low, "quartile_3": high, "first_ms": slow_ms, "second_ms": quick_ms}


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


def half(work: Callable[..., None], channels: int, size: int, batch: int, rounds: int) -> dict[str, float]:
    """Scale 1/2 relative to a plain convolution."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, 3, 2, 1).train(work is train)
    layer = ContinuousConv2d(channels, channels, 3, 2).train(work is train)
    x = torch.randn(batch, channels, size, size)
    return ratios(lambda: work(layer, x), lambda: work(plain, x), rounds, calls=10 if batch < 32 else 1)


def whole_model(work: Callable[..., None], rounds: int) -> dict[str, float]:
    """resnet50_cc relative to resnet50, four images of 224 pixels."""
    plain, model = (timm.create_model(name).train(work is train) for name in ("resnet50", "resnet50_cc"))
    x = torch.randn(4, 3, 224, 224)
    return ratios(lambda: work(model, x), lambda: work(plain, x), rounds)


def show(name: str, row: dict[str, float], peer: str) -> dict[str, float]:
    """Print a ratio with its quartiles."""
    quartiles = f"({row['quartile_1']:.3f} to {row['quartile_3']:.3f})"
    print(f"{name}: {row['ratio']:.3f} {quartiles} x {peer}, {row['second_ms']:.2f} ms", flush=True)
    return row


def anywhere(work: Callable[..., None], net: dict[str, Any], rounds: int) -> dict[str, float]:
    """Building the weights relative to the layer at scale 0.61: time and peak memory."""
    torch.manual_seed(0)
    layer = ContinuousConv2d(CHANNELS, CHANNELS, scale=SCALE, **net).train(work is train)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    torch.testing.assert_close(layer(x), with_weights_built(layer, x), rtol=1e-4, atol=1e-4)
    built, ours = (lambda: work(lambda x: with_weights_built(layer, x), x)), (lambda: work(layer, x))
    result = ratios(built, ours, rounds)
    limited = ContinuousConv2d(CHANNELS, CHANNELS, scale=SCALE, memory_limit=2**21, **net).train(work is train)
    memory = {"built": peak_bytes(built), "ours": peak_bytes(ours), "limited": peak_bytes(lambda: work(limited, x))}
    return {
        **result,
        **{f"{name}_megabytes": value / 2**20 for name, value in memory.items()},
        "memory_ratio": memory["built"] / memory["ours"],
        "limited_memory_ratio": memory["built"] / memory["limited"],
        "limited_slowdown": ratios(lambda: work(limited, x), ours, rounds)["ratio"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cc_speed.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds}
    print(results["machine"])
    for name, work in (("inference", infer), ("training", train)):
        for channels, size, batch in HALVED:
            key = f"scale 1/2, {channels} channels, {size} x {size}, batch {batch}, {name}"
            results[key] = show(key, half(work, channels, size, batch, arguments.rounds), "nn.Conv2d")
        key = f"resnet50_cc, batch 4, {name}"
        results[key] = show(key, whole_model(work, max(arguments.rounds // 4, 3)), "resnet50")
    for net, settings in NETS.items():
        for name, work in (("inference", infer), ("training", train)):
            row = anywhere(work, settings, arguments.rounds)
            results[f"scale {SCALE}, {net}, {name}"] = row
            print(
                f"scale {SCALE}, {net}, {name}: {row['ratio']:.1f} ({row['quartile_1']:.1f} to"
                f" {row['quartile_3']:.1f}) times faster than building the weights, {row['second_ms']:.1f} ms;"
                f" memory {row['built_megabytes']:.1f} / {row['ours_megabytes']:.1f} MB ="
                f" {row['memory_ratio']:.0f}; with memory_limit 2 MiB {row['limited_megabytes']:.1f} MB ="
                f" {row['limited_memory_ratio']:.0f}, {row['limited_slowdown']:.2f} x the time",
                flush=True,
            )
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
