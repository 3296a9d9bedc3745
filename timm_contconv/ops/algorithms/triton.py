"""Depthwise convolution on CUDA by Triton (triton_kernels.py), in tiles of several shapes."""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from .algorithm import Algorithm

__all__ = ["TILES", "Geometry", "Triton"]

#: Rows and columns of the tiles; measuring chooses among them. Wide ones load less, narrow ones multiply fewer zeros.
TILES = ((1, 64), (4, 16), (4, 32), (8, 8), (8, 16), (8, 32), (16, 16))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VECTOR_BYTES = 16
# Programs that keep a large device busy: fewer than these share a weight's gradient.
_FEWEST_PROGRAMS = 512
# Products that tensor cores make while a pixel is loaded from the cache, by an H100's data sheet.
_PRODUCTS_PER_LOAD = 100
# The same for a number of the bands, which goes through the card's memory twice.
_PRODUCTS_PER_BAND_NUMBER = 400
# Of bands, so that they do not crowd out what a user has on the card.
_MOST_BYTES = 1 << 28
# Taps whose gradients one program sums up.
_MOST_TAPS = 32


class _Axis(NamedTuple):
    """One spatial axis of a correlation: output o reads inputs o * stride - left + tap."""

    size: int
    taps: int
    stride: int
    left: int
    outputs: int

    def turned(self) -> "_Axis":
        """That of the gradient for the input: a correlation of the gradient, which strides spread, and flipped taps."""
        return _Axis((self.outputs - 1) * self.stride + 1, self.taps, 1, self.taps - 1 - self.left, self.size)

    def needs(self, tile: int) -> tuple[int, int]:
        """The tap with which a tile's first output reads the first input that any tile needs, and how many it needs."""
        last_tile = (self.outputs - 1) // tile * tile * self.stride
        first = max(0, self.left - last_tile)
        return first, max(1, min((tile - 1) * self.stride + self.taps, self.size + self.left) - first)


class Geometry(NamedTuple):
    """What kernels know of a problem. Width and offset_x count vectors of 16 bytes."""

    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    #: Where a tile's first line and pixel stand before its first output times the stride, and their taps there.
    offset_y: int
    offset_x: int
    first_y: int
    first_x: int
    #: Lines that a tile needs, and in each of them blocks of DEPTH pixels.
    lines: int
    blocks: int

    @classmethod
    def of(cls, channels: int, axes: tuple[_Axis, _Axis], tile: tuple[int, int], vector: int) -> tuple["Geometry", int]:
        """The geometry, and DEPTH."""
        rows, columns = axes
        (first_y, lines), (first_x, pixels) = (a.needs(t) for a, t in zip(axes, tile, strict=True))
        offset_x = -(-(columns.left - first_x) // vector)  # whole vectors
        shift = offset_x * vector - (columns.left - first_x)
        depth = _depth(pixels + shift, vector)
        return cls(
            channels=channels,
            height=rows.size,
            width=-(-columns.size // vector),
            out_height=rows.outputs,
            out_width=columns.outputs,
            kernel_height=rows.taps,
            kernel_width=columns.taps,
            stride_y=rows.stride,
            stride_x=columns.stride,
            offset_y=rows.left - first_y,
            offset_x=offset_x,
            first_y=first_y,
            first_x=first_x - shift,
            lines=lines,
            blocks=-(-(pixels + shift) // depth),
        ), depth  # fmt: skip

    @property
    def steps(self) -> int:
        """Products per tile."""
        return self.lines * self.blocks


class Triton(Algorithm):
    """Implicit matrix products on tensor cores, with float32 sums; float32 numbers are multiplied as three TF32 parts.

    Images are made contiguous. Two spatial dimensions; one runs as an image of height 1. With TRITON_INTERPRET=1 in
    the environment it runs on the CPU, slowly, for tests.
    """

    spreads_nan = True

    def __init__(self, rows: int, columns: int) -> None:
        self.name = f"triton_{rows}x{columns}"
        self.tile = rows, columns

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if not problem.is_depthwise:
            return "it is for depthwise convolutions only"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if problem.device.type != "cuda" and not _is_interpreted():
            return "it runs on CUDA only (or with TRITON_INTERPRET=1 in the environment)"
        if problem.dtype not in _DTYPES:
            return "it computes float32, bfloat16 and float16 only"
        if problem.ndim > 2:
            return "it needs 1 or 2 spatial dimensions"
        g, depth = self._geometry(pass_, problem)
        if self.tile[1] > max(8, 2 * g.out_width - 1):
            return f"half of its tile would be empty, with images of {g.out_width} pixels in a row"
        size = self._band_numbers(g, depth) * (4 if pass_ == "weight" else problem.dtype.itemsize)
        return f"it would need {size >> 20} MiB for bands" if size > _MOST_BYTES else None

    def cost(self, pass_: str, problem: Problem) -> float:
        """The work of a pass, in multiply-adds, to compare tiles by; zeros of the bands and loads count."""
        g, depth = self._geometry(pass_, problem)
        rows, columns = self.tile
        tiles = g.channels * problem.batch * -(-g.out_height // rows) * -(-g.out_width // columns)
        products = tiles * g.steps * depth * (rows * columns + _PRODUCTS_PER_LOAD)
        return products + self._band_numbers(g, depth) * _PRODUCTS_PER_BAND_NUMBER

    def _geometry(self, pass_: str, problem: Problem) -> tuple[Geometry, int]:
        rows, columns = _axes(problem)
        axes = (rows.turned(), columns.turned()) if pass_ == "input" else (rows, columns)
        return Geometry.of(problem.in_channels, axes, self.tile, _vector(problem.dtype))

    def _band_numbers(self, g: Geometry, depth: int) -> int:
        """Numbers of the bands, and of the sums along whose diagonals a weight's gradient is found."""
        return g.channels * g.steps * depth * self.tile[0] * self.tile[1]

    def output(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._correlate("output", problem, _lines(x), weight, bias).view(problem.output_shape)

    def input(self, problem: Problem, grad: Tensor, weight: Tensor) -> Tensor:
        flipped = weight.flip(tuple(range(2, weight.ndim)))
        return self._correlate("input", problem, _lines(grad, problem.stride), flipped, None).view(problem.input_shape)

    def _correlate(self, pass_: str, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from .triton_kernels import band_kernel, output_kernel

        g, depth = self._geometry(pass_, problem)
        rows, columns = self.tile
        bands = x.new_empty(g.channels, g.steps, depth, rows * columns)
        out = x.new_empty(problem.batch, g.channels, g.out_height, g.out_width)
        bias = x.new_zeros(g.channels) if bias is None else bias
        options = _options(x, 64, 64 * rows * columns, (64 + rows * columns) * depth)
        options["STORED"] = math.gcd(g.out_width, options["VECTOR"])
        tiles = problem.batch * -(-g.out_height // rows)
        grid = (-(-tiles // options["TILES"]), -(-g.out_width // columns), g.channels)
        shape = (g, rows, columns, depth)
        with _device(x):
            band_kernel[g.steps, g.channels](weight.to(x.dtype).contiguous(), bands, *shape, num_warps=8)
            output_kernel[grid](x, bands, bias, out, problem.batch, *shape, **options)
        return out

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        from .triton_kernels import diagonal_kernel, weight_kernel

        rows, columns = self.tile
        g, depth = self._geometry("weight", problem)
        options = _options(x, 32, rows * columns * depth, 32 * (rows * columns + depth))
        tiles = problem.batch * -(-g.out_height // rows)
        per_split = _multiple(min(tiles, -(-tiles * g.steps * g.channels // _FEWEST_PROGRAMS)), options["TILES"])
        splits = -(-tiles // per_split)
        parts = torch.empty(splits, g.channels, g.steps, rows * columns * depth, dtype=torch.float32, device=x.device)
        out = x.new_empty(problem.weight_shape)
        taps = min(_MOST_TAPS, 1 << (g.kernel_width - 1).bit_length())
        grid = (-(-g.kernel_width // taps), g.kernel_height, g.channels)
        shape = (g, rows, columns, depth)
        with _device(x):
            weight_kernel[splits, g.steps, g.channels](
                _lines(grad), _lines(x), parts, problem.batch, per_split, *shape, **options
            )
            diagonal_kernel[grid](parts, out, splits, *shape, taps, num_warps=8)
        return out


def _axes(problem: Problem) -> tuple[_Axis, _Axis]:
    """Rows and columns; one spatial dimension is an image of height 1."""
    sizes = problem.input_size, problem.kernel_size, problem.stride, problem.padding, problem.output_size
    columns = _Axis(*(s[-1] for s in sizes))
    return (_Axis(*(s[0] for s in sizes)) if problem.ndim == 2 else _Axis(1, 1, 1, 0, 1)), columns


def _vector(dtype: torch.dtype) -> int:
    return _VECTOR_BYTES // dtype.itemsize


def _depth(pixels: int, vector: int) -> int:
    """Pixels per product: few blocks, and no more zeros than needed. Numbers of 4 bytes need half as many."""
    least = 2 * vector
    return min((least, 2 * least, 4 * least), key=lambda depth: -(-pixels // depth) * (depth + least))


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _lines(images: Tensor, stride: tuple[int, ...] = (1, 1)) -> Tensor:
    """Contiguous images (N, C, H, W) whose W is whole vectors; copied, spread by a stride, with zeros, where needed."""
    images = images.unsqueeze(2) if images.ndim == 3 else images
    step_y, step_x = (1, *stride)[-2:]
    n, c, height, width = images.shape
    height, width = (height - 1) * step_y + 1, (width - 1) * step_x + 1
    padded = _multiple(width, _vector(images.dtype))
    if images.is_contiguous() and images.shape == (n, c, height, padded):
        return images
    lines = images.new_zeros(n, c, height, padded)
    lines[..., ::step_y, :width:step_x] = images
    return lines


def _options(x: Tensor, tiles: int, sums: int, loaded: int) -> dict[str, Any]:
    """How blocks are multiplied: so many tiles at a time, with so many sums in registers and numbers loaded.

    The stages of the pipeline have to fit into a small card's memory.
    """
    return {
        "VECTOR": _vector(x.dtype),
        "TILES": tiles,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        "UPCAST": _is_interpreted(),
        "num_warps": 8 if sums > 64 * 64 else 4,
        "num_stages": 3 if loaded * x.element_size() <= 1 << 15 else 2,
    }


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of `x`; a CPU has no number."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
