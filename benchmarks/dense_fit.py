"""Fits the cost rule of convolutions between all channels, and writes timm_contconv/ops/dense_costs.json.

    python -m benchmarks.dense_fit [--output FILE] [--samples FILE]

Forward and backward together, at a grid of shapes in float32, bfloat16 and float16; the rule is fitted as
`benchmarks/cost_rule.py` says, to the amounts of work that `dense_features` gives.
"""

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cost_rule import Samples, record, seconds
from timm_contconv import ops
from timm_contconv.ops import dense_dft, dense_fft
from timm_contconv.ops.dense import dense_cost_key, dense_features

# (batch, channels in, channels out, size), by number of spatial dimensions
SHAPES = {
    1: [(2, 16, 16, (1024,)), (1, 8, 32, (4096,)), (4, 32, 32, (256,))],
    2: [
        *((8, 24, 24, (32, 32)), (4, 48, 48, (32, 32)), (4, 8, 24, (16, 16)), (4, 3, 32, (32, 32))),
        *((2, 64, 64, (56, 56)), (32, 32, 32, (16, 16)), (1, 16, 16, (64, 64)), (8, 128, 128, (14, 14))),
    ],
    3: [(1, 4, 8, (16, 16, 16))],
}
KERNELS = {1: [65, 129, 255, 1023, 4095], 2: [5, 7, 9, 13, 17, 25, 33, 65], 3: [5, 9, 15]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# More multiply-adds than this are not waited for.
MOST_MACS = 4e9


def passes(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Forward and backward by every algorithm; the gradient of the output is the output."""
    dims, ones = x.ndim - 2, (1,) * (x.ndim - 2)
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    size, kernel_size = x.shape[2:], weight.shape[2:]

    def pytorch() -> object:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return plain(*leaves, None, 1, padding).square().sum().backward()

    def fft() -> object:
        y = dense_fft.output(x, weight, ones, padding, 1)
        dense_fft.input_gradient(y, weight, size, ones, padding, 1)
        return dense_fft.weight_gradient(y, x, kernel_size, ones, padding, 1)

    def dft() -> object:
        y = dense_dft.output(x, weight, ones, padding).to(x.dtype).contiguous()
        dense_dft.input_gradient(y, weight, size, ones, padding).contiguous()
        return dense_dft.weight_gradient(y, x, kernel_size, ones, padding)

    return {"pytorch": pytorch, "fft": fft, **({"dft": dft} if dims == 2 else {})}


def measure() -> Samples:
    """Seconds and features of every algorithm, by cost key."""
    table: Samples = defaultdict(list)
    for dtype, (dims, shapes) in itertools.product(DTYPES, SHAPES.items()):
        for (n, c_in, c_out, size), kernel in itertools.product(shapes, KERNELS[dims]):
            sizes = (n, c_in, *size), (c_out, c_in, *(kernel,) * dims)
            if kernel > 2 * max(size) or n * c_in * math.prod(size) * c_out * kernel**dims > MOST_MACS:
                continue
            x, weight = (torch.randn(shape, dtype=dtype) for shape in sizes)
            padding = (kernel // 2,) * dims
            times = {name: seconds(call) for name, call in passes(x, weight, padding).items()}
            features = {name: dense_features(name, *sizes, (1,) * dims, padding, 1) for name in times}
            table[dense_cost_key(dims, dtype)].append((features, times))
            print(dtype, *sizes, {name: f"{1000 * t:.2f} ms" for name, t in times.items()}, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, help="also write the features and seconds of every point")
    parser.add_argument("--output", type=Path, default=Path(ops.__file__).with_name("dense_costs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record(measure(), "python -m benchmarks.dense_fit", options.output, options.samples)


if __name__ == "__main__":
    main()
