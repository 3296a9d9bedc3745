"""SMPConv against its released formulation: construction, and a training step of smpconv_tiny.

    python -m benchmarks.smp [--batch N] [--image N] [--repeats N] [--threads N] [--output FILE]

The released formulation evaluates all points at all pixels with their two-dimensional differences, and convolves
with `conv2d` (tests/smpconv_peer.py). Both sides take turns, so that whatever else the machine does meets them
alike; a ratio is the median over the turns. Ours runs channels last, as a user of convolutions on a CPU would; the
released formulation runs as it is, contiguous (it asks for that itself), which is the faster of its two layouts.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_contconv as tcc
from tests.peers.smpconv import ReleasedNet, ReleasedSmp
from timm_contconv.layers import SmpConv2d

LAYERS = ((96, 31), (192, 29), (384, 27), (768, 13))


def compare(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of both, measured in turns after one run of each that does not count."""
    times: dict[str, list[float]] = {"ours": [], "released": []}
    ours(), theirs()
    for _ in range(repeats):
        for name, work in (("ours", ours), ("released", theirs)):
            start = clock()
            work()
            times[name].append(clock() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = [theirs_ / ours_ for ours_, theirs_ in zip(times["ours"], times["released"], strict=True)]
    return {**medians, "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def construction(channels: int, size: int, repeats: int) -> dict[str, float]:
    """Processor time, on one thread, of the forward and backward of one layer's kernel."""
    layer = SmpConv2d(channels, channels, size, groups=channels, points="layer", normalize=False)
    peer = ReleasedSmp(channels, size)
    return compare(
        lambda: layer.construct().square().sum().backward(),
        lambda: peer.kernel().square().sum().backward(),
        repeats,
        time.process_time,
    )


def training_step(model: nn.Module, batch: int, image: int) -> Callable[[], None]:
    """Forward, backward, AdamW step and constraint on random images."""
    x, y = torch.randn(batch, 3, image, image), torch.randint(1000, (batch,))
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr=1e-4, weight_decay=0.05))

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tcc.constrain_(model)

    return step


def inference(model: nn.Module, batch: int, image: int) -> Callable[[], torch.Tensor]:
    x = torch.randn(batch, 3, image, image)
    return torch.inference_mode()(lambda: model(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the networks")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/smp.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}

    def record(name: str, result: dict[str, float]) -> None:
        results[name] = result
        print(
            f"{name}: {result['ratio']:.2f} ({result['ratio_min']:.2f} to {result['ratio_max']:.2f}) times as fast"
            f" ({result['ours'] * 1e3:.1f} ms, released formulation {result['released'] * 1e3:.1f} ms)",
            flush=True,
        )

    torch.set_num_threads(1)
    for channels, size in LAYERS:
        record(f"construction {channels} x {size}²", construction(channels, size, 8 * arguments.repeats))
    torch.set_num_threads(arguments.threads)
    model = timm.create_model("smpconv_tiny", drop_path_rate=0.0).to(memory_format=torch.channels_last)
    peer = ReleasedNet()
    steps = [training_step(each, arguments.batch, arguments.image) for each in (model, peer)]
    record("training step", compare(*steps, arguments.repeats))
    runs = [inference(each.eval(), arguments.batch, arguments.image) for each in (model, tcc.merge(model), peer)]
    record("inference", compare(runs[0], runs[2], arguments.repeats))
    record("inference, merged", compare(runs[1], runs[2], arguments.repeats))
    settings = {"batch": arguments.batch, "image": arguments.image, "threads": arguments.threads}
    machine = {"machine": platform.machine(), "torch": torch.__version__}
    text = json.dumps({**settings, **machine, "repeats": arguments.repeats, "results": results}, indent=2)
    arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
