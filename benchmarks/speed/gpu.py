"""Everything that is to be known of a card: each pass of the convolution against cuDNN, and whole models.

    python -m benchmarks.speed.gpu [--seconds 400] [--repeats 5] [--device cuda] [--output FOLDER] [--tiny]
                                   [--parts passes models]

Passes are those of the four stages of ConvNeXt-T, kernels of 7 to 51 pixels, batch 64, bfloat16 and float32, against
PyTorch's convolution in cuDNN's benchmark mode on contiguous and on channels-last tensors. Models run in bfloat16
(autocast), batch 64 at 224², eager and compiled, beside the plain and the merged model. Contenders take turns; times
are medians of the device's clock, per call in a stream of calls. What does not fit into --seconds is left out and
named.

Writes gpu-CARD.json, .md and .png. `--device cpu --tiny` tries the script itself where there is no card.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import timm_contconv as tcc
from benchmarks.common import RESULTS, arguments, infer, machine, new_parser, training_step
from benchmarks.speed.depthwise import FORMATS, STAGES, calls_by_pass, chosen, ours, plain, useful_macs
from timm_contconv.ops.problem import PASSES

KERNELS = (23, 7, 51, 13, 31)
#: Each model with the one that it is compared with, if timm has it.
MODELS = {"convnext_tiny_dcls_gauss": "convnext_tiny", "smpconv_tiny": None, "resnet50_genv": "resnet50"}
Call = Callable[[], object]


# ---- timing


class Clock:
    """Seconds of calls on one device, within a budget."""

    def __init__(self, device: torch.device, repeats: int, budget: float) -> None:
        self.device, self.repeats = device, repeats
        self._end = time.monotonic() + budget

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self._end

    def medians(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """The median of each; they take turns. A call of more than 50 ms has fewer."""
        for call in calls.values():
            call()  # measures, compiles, loads
        first = {name: self._seconds(call, 1) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(self.repeats):
            for name, call in calls.items():
                if turn < 2 or first[name] < 0.05:
                    times[name].append(self._seconds(call, 1 if first[name] > 0.005 else 5))
        return {name: statistics.median(values) for name, values in times.items()}

    def _seconds(self, call: Call, count: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / count


# ---- passes


def bench_passes(dtype: str, clock: Clock, batch: int, kernels: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row per kernel size, stage and pass, until the budget is spent."""
    for kernel in kernels:
        for channels, size in STAGES:
            settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": clock.device}
            weight = torch.randn(channels, 1, kernel, kernel, **settings)
            x, grad = (torch.randn(batch, channels, size, size, **settings) for _ in range(2))
            calls = {
                (who, layout): calls_by_pass(
                    convolve, x.contiguous(memory_format=form), weight, grad.contiguous(memory_format=form)
                )
                for layout, form in FORMATS.items()
                for who, convolve in (("ours", ours), ("cudnn", plain))
            }
            for pass_ in PASSES:
                row = {"dtype": dtype, "kernel": kernel, "channels": channels, "size": size, "pass": pass_}
                if clock.is_over:
                    yield {**row, "left out": "no time"}
                    continue
                seconds = clock.medians({f"{who}, {layout}": c[pass_] for (who, layout), c in calls.items()})
                for layout in FORMATS:
                    row[f"algorithm, {layout}"] = chosen(pass_, x, kernel, layout)
                best = min(seconds[f"ours, {layout}"] for layout in FORMATS)
                macs = useful_macs(batch, channels, size, kernel)
                row.update({f"{name}, ms": 1000 * s for name, s in seconds.items()})
                row["useful TFLOP/s"] = 2e-12 * macs / best
                row["gain"] = min(seconds[f"cudnn, {layout}"] for layout in FORMATS) / best
                yield row


# ---- models


def contenders(name: str) -> dict[str, nn.Module]:
    """The model, merged, and the plain one."""
    model = timm.create_model(name, num_classes=10)
    models = {"ours": model, "merged": tcc.merge(model)}
    if base := MODELS[name]:
        models["plain"] = timm.create_model(base, num_classes=10)
    return models


def bench_models(name: str, compiled: bool, clock: Clock, images: Tensor) -> Iterator[dict[str, Any]]:
    """One row per work, until the budget is spent."""
    for work in ("inference", "training step"):
        row: dict[str, Any] = {"model": name, "compiled": compiled, "work": work}
        if clock.is_over:
            yield {**row, "left out": "no time"}
            continue
        calls = {}
        for who, model in contenders(name).items():
            model = model.to(images.device)
            if compiled:
                model.compile()
            call = training_step(model, images) if work == "training step" else functools.partial(infer, model, images)
            calls[who] = functools.partial(with_autocast, call, images.device.type)
        yield {**row, **{f"{who}, ms": 1000 * s for who, s in clock.medians(calls).items()}}
        torch._dynamo.reset()


def with_autocast(call: Call, device: str) -> object:
    with torch.autocast(device, torch.bfloat16):
        return call()


# ---- results


def table(record: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    parts = [f"# {record['card']}", f"PyTorch {record['machine']['torch']}, batch {record['batch']}."]
    for title, rows in (("Passes", record["passes"]), ("Models", record["models"])):
        done = [row for row in rows if "left out" not in row]
        parts.append(f"## {title}")
        if done:
            names = list(dict.fromkeys(name for row in done for name in row))
            lines = [names, ["---"] * len(names), *([_cell(row.get(name, "")) for name in names] for row in done)]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        if missing := len(rows) - len(done):
            parts.append(f"Not measured, because the time was over: {missing} of {len(rows)}.")
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Gains over the better of cuDNN's two, by kernel size; one panel per dtype and pass."""
    rows = [row for row in record["passes"] if "left out" not in row]
    dtypes = sorted({row["dtype"] for row in rows})
    figure = Figure(figsize=(10, 3 * max(1, len(dtypes))), layout="constrained")
    panels = figure.subplots(max(1, len(dtypes)), len(PASSES), squeeze=False, sharey=True)
    for line, dtype in zip(panels, dtypes, strict=False):
        for panel, pass_ in zip(line, PASSES, strict=True):
            for channels, size in STAGES:
                points = sorted(
                    (row["kernel"], row["gain"])
                    for row in rows
                    if (row["dtype"], row["pass"], row["channels"]) == (dtype, pass_, channels)
                )
                panel.plot(*zip(*points, strict=True) if points else ((), ()), "o-", label=f"{channels} x {size}²")
            panel.axhline(1, color="gray", linewidth=0.8)
            panel.set(title=f"{pass_}, {dtype}", xlabel="kernel", yscale="log")
    panels[0][0].set_ylabel("cuDNN's time / ours")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(record["card"])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--parts", nargs="+", choices=("passes", "models"), default=["passes", "models"])
    parser.add_argument("--tiny", action="store_true", help="one image of 64², two kernels: to try the script")
    options = arguments(parser)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("benchmarks.speed.gpu needs an NVIDIA card that PyTorch can use, and found none.")
    record = measure(options)
    path = options.output / f"gpu-{re.sub(r'[^a-z0-9]+', '-', record['card'].lower()).strip('-')}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(record), encoding="utf-8")
    plot(record, path.with_suffix(".png"))
    print(table(record))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts, the most telling ones first."""
    torch.backends.cudnn.benchmark = True
    device = torch.device(options.device)
    clock = Clock(device, options.repeats, options.seconds)
    batch, size, kernels = (1, 64, (7, 13)) if options.tiny else (64, 224, KERNELS)
    images = torch.randn(batch, 3, size, size, device=device)
    passes = functools.partial(bench_passes, clock=clock, batch=batch, kernels=kernels)
    models = functools.partial(bench_models, clock=clock, images=images)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card"
    record: dict[str, Any] = {"card": card, "batch": batch, "passes": [], "models": [], "machine": machine()}
    parts: list[tuple[str, Iterator[dict[str, Any]]]] = [("passes", passes("bfloat16"))]
    parts += [("models", models(name, False)) for name in MODELS]
    parts += [("passes", passes("float32"))]
    parts += [("models", models(name, True)) for name in MODELS]
    for part, rows in parts:
        for row in rows if part in options.parts else ():
            record[part].append(row)
            print(", ".join(f"{name} {_cell(value)}" for name, value in row.items()), flush=True)
    return record


if __name__ == "__main__":
    main()
