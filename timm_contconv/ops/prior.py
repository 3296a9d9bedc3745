"""Which algorithms may be the fastest for a problem, where nothing was measured: a rule of a few lines."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from .algorithms import ALGORITHMS, TRITON, Algorithm
from .algorithms.dft import multiply_adds
from .algorithms.fourier import axes_of
from .problem import Problem, output_size

__all__ = ["candidates", "is_large"]

# Below this many taps, by spatial dimensions, no algorithm of ours gains.
_FEWEST_TAPS = {1: 65, 2: 25, 3: 65}
_FEWEST_DEPTHWISE_TAPS = {1: 7, 2: 9, 3: 65}
# Products that compiled loops make in the time of an FFT per pixel and halving of a line. FFTs are faster where more
# are to be made, and not worth a try where far fewer are; but without compiled loops they are, up to PyTorch's own.
_PRODUCTS, _FEWEST_PRODUCTS, _FEWEST_PRODUCTS_OF_PYTORCH = 40, 8, 2
# Tiles of Triton's kernels that are worth measuring for one problem; each has to be compiled.
_MOST_TILES = 4


def is_large(kernel_size: Sequence[int], is_depthwise: bool) -> bool:
    """Whether an algorithm of ours may gain anything for kernels of this size."""
    taps, dims = math.prod(kernel_size), len(kernel_size)
    return taps >= (_FEWEST_DEPTHWISE_TAPS if is_depthwise else _FEWEST_TAPS).get(dims, math.inf)


def candidates(pass_: str, problem: Problem) -> list[Algorithm]:
    """Algorithms that apply to a pass and may be the fastest, the most promising one first.

    Under anomaly detection none is among them that spreads a NaN over an image, so that PyTorch names the operation
    that it came from.
    """
    if not is_large(problem.kernel_size, problem.is_depthwise):
        names = ["pytorch"]
    elif problem.device.type != "cpu":
        names = _on_accelerator(pass_, problem)
    else:
        names = _depthwise(pass_, problem) if problem.is_depthwise else _dense(problem)
    able = [a for a in map(ALGORITHMS.__getitem__, names) if not a.refusal(pass_, problem)]
    if torch.is_anomaly_enabled():
        able = [a for a in able if not a.spreads_nan]
    return able or [ALGORITHMS["fft" if ALGORITHMS["pytorch"].refusal(pass_, problem) else "pytorch"]]


def _on_accelerator(pass_: str, problem: Problem) -> list[str]:
    """PyTorch's own first: only measuring can know better, and on other accelerators than CUDA's nothing was tried."""
    if problem.device.type != "cuda":
        return ["pytorch"]
    names = ["pytorch"]
    if problem.is_depthwise and problem.ndim <= 2:
        able = (tile for tile in TRITON if not tile.refusal(pass_, problem))
        tiles = sorted(able, key=lambda tile: tile.cost(pass_, problem))
        names += ["channels_last", *(tile.name for tile in tiles[:_MOST_TILES])]
    return [*names, "fft"] if math.prod(problem.kernel_size) > 81 else names


def _depthwise(pass_: str, problem: Problem) -> list[str]:
    """From the fastest of each on an AMD EPYC (AVX2) and an Intel Xeon (AVX-512), torch 2.15, one and two threads.

    benchmarks/speed/choice.py measures how good it is.
    """
    taps = math.prod(problem.kernel_size)
    names = ["direct", "channels_last", "pytorch"]
    few = 25 if pass_ == "weight" else 81 if math.prod(problem.input_size) >= 56**2 else 49
    if problem.channels_last and taps < few:
        names = ["channels_last", "pytorch", "direct"]  # oneDNN has kernels for these
    # On channels-last tensors it is PyTorch's own, but for the gradient of the input, for which oneDNN has no kernel.
    if (problem.channels_last and pass_ != "input") or (pass_ == "weight" and taps >= 49):
        names.remove("channels_last")
    products = _products(problem.input_size, problem.kernel_size, problem.stride, problem.padding)
    plane = math.prod(a.length for a in axes_of(problem))
    ratio = products / (plane * max(1.0, math.log2(plane)))
    is_compiled = ALGORITHMS["direct"].refusal(pass_, problem) is None
    if ratio > (_FEWEST_PRODUCTS if is_compiled else _FEWEST_PRODUCTS_OF_PYTORCH):
        names.insert(0 if ratio > _PRODUCTS else 1, "fft")
    return names


@lru_cache(maxsize=1024)
def _products(size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> int:
    """Products of a pixel and a tap, for one channel of one image; those with the padding do not count."""
    total = 1
    for n, out, k, s, p in zip(size, output_size(size, kernel, stride, padding), kernel, stride, padding, strict=True):
        total *= sum(max(0, min(k, n + p - s * i) - max(0, p - s * i)) for i in range(out))
    return total


def _dense(problem: Problem) -> list[str]:
    """By multiply-adds, in units of what one of PyTorch's takes (Intel Xeon with AVX-512, one thread, torch 2.15)."""
    # Units with matrix instructions for half precision.
    costs = {"pytorch": problem.macs * (1 / 6 if problem.dtype in (torch.bfloat16, torch.float16) else 1.0)}
    plane = math.prod(a.length for a in axes_of(problem))
    pairs = problem.out_channels * problem.in_channels // problem.groups
    spectra = problem.batch * (problem.in_channels + problem.out_channels) + pairs
    transforms, products = {1: (8.6, 0.0), 2: (19.0, 33.0), 3: (5.0, 0.0)}[problem.ndim]
    costs["fft"] = transforms * spectra * plane * math.log2(plane) + products * problem.batch * pairs * plane
    if problem.ndim == 2 and problem.groups == 1:
        costs["dft"] = 2.7 * multiply_adds(problem)
    return sorted(costs, key=costs.__getitem__)
