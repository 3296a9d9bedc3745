"""What cropping saves, and a training step of flexnet7 against the released formulation.

    python -m benchmarks.speed.flex_speed [--batch N] [--repeats N] [--parts PART ...] [--threads N]

The uncropped ("whole") layer is compared as this package runs it (its engine takes Fourier transforms for so large a
kernel), and the forward pass also with PyTorch's `conv2d`.

The released formulation (tests/peers/flexnet.py): the same layers, not compiled. Every forward pass reads the masks and
crops exactly; kernels are computed by 1x1 convolutions over the grid; `conv2d` runs on contiguous tensors. Masks are as
they start (sigma 0.125, 9 x 9 pixels of 33 x 33), and as in the paper's Fig. 6, where they grow with depth.

A figure is the median over turns of the ratio in the same turn. Writes flex_speed.json, part by part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks.common import (
    arguments,
    in_turns,
    machine_file,
    medians,
    new_parser,
    ratio,
    read_results,
    training_step,
    write_results,
)
from tests.peers.flexnet import ReleasedFlexConv, ReleasedFlexNet
from timm_contconv.layers import FlexConv2d

PARTS = ("layers", "flexnet7")
SIGMA, SIZE = 0.125, 33
LARGEST_SIGMAS = (SIGMA, 0.25, 0.5)  # of the last layer; masks grow with depth
LAYERS = ((24, False), (48, False), (96, True), (384, True))  # channels, depthwise


def by_conv2d(layer: FlexConv2d, x: Tensor) -> Tensor:
    """A layer's whole kernel, convolved by PyTorch's `conv2d`."""
    return F.conv2d(x, layer.weight, layer.bias, padding="same", groups=layer.groups)


def layer_step(layer: Callable[[Tensor], Tensor], batch: int, channels: int, backward: bool) -> Callable[[], None]:
    """Forward, or forward and backward, of one layer on 32 x 32 images."""
    x = torch.randn(batch, channels, SIZE - 1, SIZE - 1).to(memory_format=torch.channels_last)
    x.requires_grad_(backward)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            y = layer(x)
        if backward:
            y.sum().backward()

    return step


def cropping(channels: int, depthwise: bool, batch: int, repeats: int) -> dict[str, float]:
    """How many times as long a layer takes without its crop, forward and forward with backward."""
    settings = {"groups": channels if depthwise else 1, "initial_sigma": SIGMA}
    cropped, whole = (FlexConv2d(channels, channels, SIZE, threshold=t, **settings) for t in (0.1, 0.0))
    tcc.constrain_(cropped)
    result = {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        layers: dict[str, Callable[[Tensor], Tensor]] = {"cropped": cropped, "whole": whole}
        if not backward:  # takes minutes
            layers["conv2d"] = functools.partial(by_conv2d, whole)
        calls = {n: layer_step(layer, batch, channels, backward) for n, layer in layers.items()}
        found = in_turns(calls, repeats, f"{channels} channels, {name}")
        result |= {f"{name}, {n}": ratio(found[n], found["cropped"])["ratio"] for n in list(layers)[1:]}
    return result


@torch.no_grad()
def set_masks_(model: nn.Module, largest: float) -> None:
    """Masks from SIGMA in the first layer to `largest` in the last."""
    layers = [m for m in model.modules() if isinstance(m, FlexConv2d | ReleasedFlexConv)]
    for layer, sigma in zip(layers, torch.linspace(SIGMA, largest, len(layers)), strict=True):
        if isinstance(layer, FlexConv2d):
            layer.geometry["mask_sigma"].fill_(sigma)
        else:
            layer.mask_params[:, 1] = sigma
    tcc.constrain_(model)


def flexnet7_steps(largest: float, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of a training step, ours and the released formulation's, with the same masks."""
    models = {"ours": timm.create_model("flexnet7"), "released": ReleasedFlexNet()}
    for model in models.values():
        set_masks_(model.train(), largest)
    images = torch.randn(batch, 3, 32, 32)
    calls = {name: training_step(model, images) for name, model in models.items()}
    seconds = in_turns(calls, repeats, f"flexnet7, masks up to {largest}")
    return {**medians(seconds), **ratio(seconds["released"], seconds["ours"])}


def main() -> None:
    parser = new_parser(__doc__, machine_file("flex_speed.json"), torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = arguments(parser)
    results: dict[str, dict[str, float]] = read_results(options.output).get("results", {})
    for channels, depthwise in LAYERS if "layers" in options.parts else ():
        name = f"{channels} channels, {'depthwise' if depthwise else 'dense'}"
        results[name] = cropping(channels, depthwise, options.batch, options.repeats)
        text = "; ".join(f"{work} {value:.1f}" for work, value in results[name].items())
        print(f"{name}, sigma {SIGMA}, K {SIZE}: times as fast as uncropped: {text}", flush=True)
    for largest in LARGEST_SIGMAS if "flexnet7" in options.parts else ():
        name = f"flexnet7 training step, sigma {SIGMA} to {largest}"
        found = results[name] = flexnet7_steps(largest, options.batch, options.repeats)
        print(
            f"{name}: {found['ratio']:.2f} times as fast ({found['ours'] * 1e3:.0f} ms, released formulation"
            f" {found['released'] * 1e3:.0f} ms)",
            flush=True,
        )
    write_results(options.output, {"batch": options.batch, "repeats": options.repeats, "results": results})


if __name__ == "__main__":
    main()
