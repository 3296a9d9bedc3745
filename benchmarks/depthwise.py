"""Times each pass of the depthwise convolution against torch.nn.functional.conv2d, at ConvNeXt-T's four stages.

    python -m benchmarks.depthwise [--kernels 7 23] [--batch 8] [--repeats 5] [--device cpu] [--dtype float32] \\
        [--json FILE]

Ours and PyTorch's alternate; ratios are of medians. The rows say which algorithm was chosen and how many useful
operations a second it made (products with the padding not counted). On CUDA the baselines run with cuDNN's
benchmark mode on, and --algorithm forces what would otherwise stay PyTorch's own.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from timm_contconv import ops
from timm_contconv.ops import dispatch
from timm_contconv.ops.depthwise import depthwise_conv, input_gradient, weight_gradient
from timm_contconv.ops.problem import PASSES, Problem

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Call = Callable[[], object]


def plain_calls(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Call]:
    """PyTorch's own convolution and its backward, one call per pass."""
    channels, half = weight.shape[0], weight.shape[-1] // 2

    def backward(mask: list[bool]) -> object:
        args = ([1, 1], [half, half], [1, 1], False, [0, 0], channels, mask)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *args)

    return {
        "output": lambda: torch.nn.functional.conv2d(x, weight, None, 1, half, 1, channels),
        "input": lambda: backward([True, False, False]),
        "weight": lambda: backward([False, True, False]),
    }


def our_calls(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Call]:
    """Ours, one call per pass."""
    one, half = [1, 1], [weight.shape[-1] // 2] * 2
    return {
        "output": lambda: depthwise_conv(x, weight, None, one, half),
        "input": lambda: input_gradient(grad, weight, x.shape[2:], one, half),
        "weight": lambda: weight_gradient(grad, x, weight.shape[2:], one, half),
    }


def timed(call: Call, cuda: bool) -> float:
    """Milliseconds of one call."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def alternating(calls: dict[str, Call], repeats: int, cuda: bool) -> dict[str, float]:
    """Median milliseconds of each call, all called in turn."""
    for call in calls.values():
        call()
    rounds = [{name: timed(call, cuda) for name, call in calls.items()} for _ in range(repeats)]
    return {name: statistics.median(r[name] for r in rounds) for name in calls}


def bench(channels: int, size: int, kernel: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """One row per pass and layout of our tensors."""
    dtype, cuda = getattr(torch, options.dtype), options.device == "cuda"
    weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype, device=options.device)
    shape = (options.batch, channels, size, size)
    ours, plain = {}, {}
    for layout, form in FORMATS.items():
        x, grad = (torch.randn(shape, dtype=dtype, device=options.device).contiguous(memory_format=form) for _ in "xg")
        ours[layout], plain[layout] = our_calls(x, weight, grad), plain_calls(x, weight, grad)
        problem = Problem.of(x, x.shape[2:], weight.shape[2:], (1, 1), (kernel // 2,) * 2)
    rows = []
    for pass_ in PASSES:
        calls = {f"plain/{layout}": plain[layout][pass_] for layout in FORMATS}
        calls |= {f"ours/{layout}": ours[layout][pass_] for layout in FORMATS}
        times = alternating(calls, options.repeats, cuda)
        for layout in FORMATS:
            mine = times[f"ours/{layout}"]
            last = layout == "channels_last"
            chosen = dispatch.choose(pass_, dataclasses.replace(problem, channels_last=last)).name
            rows.append(
                {
                    "channels": channels,
                    "size": size,
                    "kernel": kernel,
                    "pass": pass_,
                    "layout": layout,
                    "algorithm": chosen,
                    "ms": mine,
                    "gflops": 2 * problem.inner_macs / mine / 1e6,
                    **{f"vs_{other}": times[f"plain/{other}"] / mine for other in FORMATS},
                    **{f"plain_{other}_ms": times[f"plain/{other}"] for other in FORMATS},
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=int, nargs="+", default=[7, 23])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--algorithm", choices=ops.algorithms())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, object]] = []
    print("kernel   stage     pass    layout         algorithm        ms   GF/s  vs contiguous  vs channels-last")
    for kernel in options.kernels:
        for channels, size in STAGES:
            forcing = ops.algorithm(options.algorithm) if options.algorithm else contextlib.nullcontext()
            with forcing, torch.inference_mode():
                fresh = bench(channels, size, kernel, options)
            for r in fresh:
                print(
                    f"{kernel:4}²  {channels:4}x{size:2}²  {r['pass']:7} {r['layout']:14} {r['algorithm']:13}"
                    f"{r['ms']:7.2f} {r['gflops']:6.0f} {r['vs_contiguous']:14.2f} {r['vs_channels_last']:17.2f}",
                    flush=True,
                )
            rows += fresh
    if options.json:
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
