"""Times each pass of the depthwise convolution against torch.nn.functional.conv2d, at ConvNeXt-T's four stages.

    python -m benchmarks.speed.depthwise [--kernels 7 23] [--batch 8] [--repeats 5] [--device cpu] [--dtype float32]
                                         [--algorithm NAME] [--threads N] [--output FILE]

Ours and PyTorch's take turns; ratios are of medians. The rows say which algorithm the engine chose and how many
multiply-adds a second it made, products with the padding not counted. On CUDA cuDNN's benchmark mode is on.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import arguments, in_turns, machine_file, medians, new_parser, write_results
from timm_contconv import ops
from timm_contconv.ops.problem import PASSES

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Call = Callable[[], object]


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return ops.conv(x, weight, None, (1, 1), [size // 2 for size in weight.shape[2:]], len(weight))


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, 1, weight.shape[-1] // 2, 1, len(weight))


def calls_by_pass(
    convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor
) -> dict[str, Call]:
    """One call per pass: the output, the gradient for the input, the gradient for the weight."""
    x_leaf, weight_leaf = x.detach().requires_grad_(), weight.detach().requires_grad_()
    of_x, of_weight = convolve(x_leaf, weight), convolve(x, weight_leaf)
    return {
        "output": lambda: convolve(x, weight),
        "input": lambda: torch.autograd.grad(of_x, x_leaf, grad, retain_graph=True),
        "weight": lambda: torch.autograd.grad(of_weight, weight_leaf, grad, retain_graph=True),
    }


def useful_macs(batch: int, channels: int, size: int, kernel: int) -> int:
    """Multiply-adds of a pass whose padding keeps the size, without products with the padding."""
    along = sum(min(i + kernel // 2, size - 1) - max(i - kernel // 2, 0) + 1 for i in range(size))
    return batch * channels * along**2


def chosen(pass_: str, x: Tensor, kernel: int, layout: str) -> str:
    """The algorithm that was measured to be the fastest."""
    for choice in reversed(ops.choices()):
        problem = choice.problem
        same = problem.input_shape == tuple(x.shape) and problem.kernel_size == (kernel, kernel)
        if same and choice.pass_ == pass_ and problem.channels_last == (layout == "channels_last"):
            return choice.algorithm
    return "not measured"


def bench(channels: int, size: int, kernel: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per pass and layout of our tensors."""
    settings = {"dtype": getattr(torch, options.dtype), "device": options.device}
    weight = torch.randn(channels, 1, kernel, kernel, **settings)
    x, grad = (torch.randn(options.batch, channels, size, size, **settings) for _ in range(2))
    calls = {}
    for layout, form in FORMATS.items():
        tensors = x.contiguous(memory_format=form), weight, grad.contiguous(memory_format=form)
        for side, convolve in (("ours", ours), ("plain", plain)):
            calls[side, layout] = calls_by_pass(convolve, *tensors)
    rows = []
    for pass_ in PASSES:
        turns = {f"{side}, {layout}": call[pass_] for (side, layout), call in calls.items()}
        times = medians(in_turns(turns, options.repeats, f"{channels} channels, {kernel}², {pass_}"))
        for layout in FORMATS:
            seconds = times[f"ours, {layout}"]
            rows.append(
                {
                    "channels": channels,
                    "size": size,
                    "kernel": kernel,
                    "pass": pass_,
                    "layout": layout,
                    "algorithm": options.algorithm or chosen(pass_, x, kernel, layout),
                    "ms": 1000 * seconds,
                    "gmacs": useful_macs(options.batch, channels, size, kernel) / seconds / 1e9,
                    **{f"vs_{other}": times[f"plain, {other}"] / seconds for other in FORMATS},
                    **{f"plain_{other}_ms": 1000 * times[f"plain, {other}"] for other in FORMATS},
                }
            )
    return rows


def main() -> None:
    parser = new_parser(__doc__, machine_file("depthwise.json"), torch.get_num_threads())
    parser.add_argument("--kernels", type=int, nargs="+", default=[7, 23])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--algorithm", choices=ops.algorithms(), help="instead of the engine's choice")
    options = arguments(parser)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    print("kernel   stage     pass    layout         algorithm        ms  GMAC/s  vs contiguous  vs channels-last")
    for kernel in options.kernels:
        for channels, size in STAGES:
            with ops.algorithm(options.algorithm) if options.algorithm else contextlib.nullcontext():
                fresh = bench(channels, size, kernel, options)
            for r in fresh:
                print(
                    f"{kernel:4}²  {channels:4}x{size:2}²  {r['pass']:7} {r['layout']:14} {r['algorithm']:13}"
                    f"{r['ms']:7.2f} {r['gmacs']:7.0f} {r['vs_contiguous']:14.2f} {r['vs_channels_last']:17.2f}",
                    flush=True,
                )
            rows += fresh
    write_results(options.output, {"batch": options.batch, "dtype": options.dtype, "rows": rows})


if __name__ == "__main__":
    main()
