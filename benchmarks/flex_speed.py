"""What cropping saves, and a training step of flexnet7 against the released formulation.

    python -m benchmarks.flex_speed [--batch N] [--repeats N] [--threads N] [--output FILE]

The uncropped ("whole") layer is compared as this package runs it (its engine takes the FFT for so large a kernel), and
the forward pass also with PyTorch's `conv2d`.

The released formulation (tests/flexnet_peer.py): the same layers, not compiled; every forward pass reads the masks and
crops exactly; kernels by 1x1 convolutions over the grid; `conv2d` on contiguous tensors. Masks are as they start
(sigma 0.125, 9 x 9 pixels of 33 x 33), and as in the paper's Fig. 6, where they grow with depth.

Contenders take turns; figures are ratios of medians.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks.timing import alternating_medians, machine
from tests.flexnet_peer import ReleasedFlexConv, ReleasedFlexNet
from timm_contconv.layers import FlexConv2d

SIGMA, SIZE = 0.125, 33
LARGEST_SIGMAS = (SIGMA, 0.25, 0.5)  # of the last layer; masks grow with depth


class Direct(nn.Module):
    """A layer's whole kernel, convolved by PyTorch's `conv2d`."""

    def __init__(self, layer: FlexConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.layer.construct(), self.layer.bias, padding="same", groups=self.layer.groups)


def layer_step(layer: nn.Module, batch: int, channels: int, backward: bool) -> Callable[[], None]:
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
    options = {"groups": channels if depthwise else 1, "initial_sigma": SIGMA}
    cropped, whole = (FlexConv2d(channels, channels, SIZE, threshold=t, **options) for t in (0.1, 0.0))
    result = {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        layers: dict[str, nn.Module] = {"cropped": cropped, "whole": whole}
        if not backward:  # takes minutes
            layers["conv2d"] = Direct(whole)
        calls = {n: layer_step(m, batch, channels, backward) for n, m in layers.items()}
        found = alternating_medians(calls, repeats, f"{channels} channels, {name}")
        result |= {f"{name}, {n}": found[n] / found["cropped"] for n in list(layers)[1:]}
    return result


def training_step(model: nn.Module, batch: int) -> Callable[[], None]:
    """Forward, backward, Adam step and, where there are some, constraints, on random images."""
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = torch.optim.Adam(tcc.param_groups(model, lr=1e-5, weight_decay=0.0))

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tcc.constrain_(model)

    return step


@torch.no_grad()
def set_masks_(model: nn.Module, largest: float) -> None:
    """Masks from SIGMA in the first layer to `largest` in the last."""
    layers = [m for m in model.modules() if isinstance(m, FlexConv2d | ReleasedFlexConv)]
    for layer, sigma in zip(layers, torch.linspace(SIGMA, largest, len(layers)), strict=True):
        if isinstance(layer, FlexConv2d):
            layer.geometry["mask_sigma"].fill_(sigma)
        else:
            layer.mask_params[:, 1] = sigma


def flexnet7_steps(largest: float, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of a training step, ours and the released formulation's, with the same masks."""
    ours, released = timm.create_model("flexnet7"), ReleasedFlexNet()
    for model in (ours, released):
        set_masks_(model.train(), largest)
    calls = {"ours": training_step(ours, batch), "released": training_step(released, batch)}
    found = alternating_medians(calls, repeats, f"flexnet7, masks up to {largest}")
    return {**found, "ratio": found["released"] / found["ours"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/flex_speed.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}
    for channels, depthwise in ((24, False), (48, False), (96, True), (384, True)):
        name = f"{channels} channels, {'depthwise' if depthwise else 'dense'}"
        results[name] = cropping(channels, depthwise, arguments.batch, arguments.repeats)
        text = "; ".join(f"{work} {ratio:.1f}" for work, ratio in results[name].items())
        print(f"{name}, sigma {SIGMA}, K {SIZE}: times as fast as uncropped: {text}", flush=True)
    for largest in LARGEST_SIGMAS:
        name = f"flexnet7 training step, sigma {SIGMA} to {largest}"
        found = results[name] = flexnet7_steps(largest, arguments.batch, arguments.repeats)
        print(
            f"{name}: {found['ratio']:.2f} times as fast ({found['ours'] * 1e3:.0f} ms, released formulation"
            f" {found['released'] * 1e3:.0f} ms)",
            flush=True,
        )
    settings = {"batch": arguments.batch, "threads": arguments.threads, "repeats": arguments.repeats}
    where = {"machine": machine(), "architecture": platform.machine()}
    arguments.output.write_text(json.dumps({**settings, **where, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
