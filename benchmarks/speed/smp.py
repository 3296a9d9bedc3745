"""SMPConv against its released formulation: construction, and a training step of smpconv_tiny.

    python -m benchmarks.speed.smp [--batch N] [--image N] [--repeats N] [--threads N] [--output FILE]

The released formulation evaluates all points at all pixels with their two-dimensional differences, and convolves
with `conv2d` (tests/peers/smpconv.py). A figure is the median over turns of the ratio in the same turn. Ours runs
channels last, as a user of convolutions on a CPU would. The released formulation runs as it is, contiguous (it asks for
that itself), which is the faster of its two layouts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import timm
import torch

import timm_contconv as tcc
from benchmarks.common import (
    arguments,
    in_turns,
    infer,
    machine_file,
    medians,
    new_parser,
    ratio,
    training_step,
    write_results,
)
from tests.peers.smpconv import ReleasedNet, ReleasedSmp
from timm_contconv.layers import SmpConv2d

LAYERS = ((96, 31), (192, 29), (384, 27), (768, 13))


def compare(
    name: str,
    ours: Callable[[], object],
    released: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Print and return median seconds of both, and how many times as fast ours is."""
    seconds = in_turns({"ours": ours, "released": released}, repeats, name, clock)
    found = {**medians(seconds), **ratio(seconds["released"], seconds["ours"])}
    print(
        f"{name}: {found['ratio']:.2f} ({found['quartile_1']:.2f} to {found['quartile_3']:.2f}) times as fast"
        f" ({found['ours'] * 1e3:.1f} ms, released formulation {found['released'] * 1e3:.1f} ms)",
        flush=True,
    )
    return found


def construction(channels: int, size: int, repeats: int) -> dict[str, float]:
    """Processor time, on one thread, of the forward and backward of one layer's kernel."""
    layer = SmpConv2d(channels, channels, size, groups=channels, points="layer", normalize=False)
    peer = ReleasedSmp(channels, size)
    return compare(
        f"construction {channels} x {size}²",
        lambda: layer.kernel().square().sum().backward(),
        lambda: peer.kernel().square().sum().backward(),
        repeats,
        time.process_time,
    )


def main() -> None:
    parser = new_parser(__doc__, machine_file("smp.json"), torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    options = arguments(parser)
    torch.set_num_threads(1)
    results = {f"construction {c} x {k}²": construction(c, k, 8 * options.repeats) for c, k in LAYERS}
    torch.set_num_threads(options.threads)
    model = timm.create_model("smpconv_tiny", drop_path_rate=0.0).to(memory_format=torch.channels_last)
    peer = ReleasedNet()
    images = torch.randn(options.batch, 3, options.image, options.image)
    steps = [training_step(each, images) for each in (model, peer)]
    results["training step"] = compare("training step", *steps, options.repeats)
    for name, each in (("inference", model), ("inference, merged", tcc.merge(model))):
        runs = [functools.partial(infer, contender, images) for contender in (each, peer)]
        results[name] = compare(name, *runs, options.repeats)
    settings = {"batch": options.batch, "image": options.image, "repeats": options.repeats}
    write_results(options.output, {**settings, "results": results})


if __name__ == "__main__":
    main()
