"""Convolution of images between all channels, by discrete Fourier transforms that are matrix products.

A transform of a few dozen pixels takes more multiply-adds as a matrix product than by FFT, and less time: its matrices
have what a matrix product is fast at, and they say where pixels stand, so that nothing is padded, cut, spread by a
stride or brought into another order. Rows are transformed to half a spectrum, as they are real; then, for a few of its
frequencies at a time, columns, so that the spectra of kernels, which are many times as large as kernels, never exist as
a whole.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..problem import Problem, compute_dtype
from .fourier import Axis, Fourier, Places, axes_of, used_taps

__all__ = ["DFT", "multiply_adds"]

# Bytes of spectra that exist at a time.
_BAND_BYTES = 1 << 23
# The longest line for which a matrix product is faster than an FFT.
_LONGEST_LINE = 192
# What PyTorch may round to inside float32 matrix products on the CPU.
_matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class DFT(Fourier):
    """Transforms by matrix products, on the CPU, in two dimensions, between all channels."""

    name = "dft"

    def refusal(self, pass_: str, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return "it runs on the CPU only"
        if problem.ndim != 2 or problem.groups != 1:
            return "it needs 2 spatial dimensions and groups=1"
        if (longest := max(a.shortest for a in axes_of(problem))) > _LONGEST_LINE:
            return f"it takes lines of up to {_LONGEST_LINE} pixels, not {longest}"
        if compute_dtype(problem.dtype) == torch.float32 and _matmul.fp32_precision not in ("none", "ieee"):
            return f"float32 matrix products are rounded to {_matmul.fp32_precision} (torch.backends)"
        return None

    def filtered(
        self, problem: Problem, images: Tensor, kernels: Tensor, places: Places, wanted: Places, conjugate: bool
    ) -> Tensor:
        axes = rows, columns = axes_of(problem)
        n, (c_from, c_to), length = problem.batch, kernels.shape[1:3], columns.shortest
        image_lines = _row_spectrum(_channels_last(images), places[0], rows)
        taps = used_taps(kernels[0], axes).permute(2, 3, 0, 1).reshape(1, rows.taps, columns.taps, -1)
        tap_lines = _row_spectrum(taps.to(image_lines.dtype), range(rows.taps), rows)
        lines = image_lines.new_empty(_half(rows), n, 2 * len(wanted[1]), c_to)
        to_pixels = _from_spectrum(wanted[1], length, lines.dtype)
        for band in _bands(axes, c_from * c_to + n * (c_from + 3 * c_to), lines):
            spectra = _column_spectrum(image_lines[:, band], places[1], columns).transpose(0, 1)
            filters = _column_spectrum(tap_lines[:, band], range(columns.taps), columns).unflatten(-1, (c_from, c_to))
            by_real, by_imaginary = ((spectra @ part).view(-1, length, 2, n, c_to) for part in filters)
            products = lines.new_empty(2, len(by_real), n, length, c_to)
            sign = 1 if conjugate else -1
            for part, other in ((0, 1), (1, 0)):
                into = products[part].transpose(1, 2)
                torch.add(by_real[:, :, part], by_imaginary[:, :, other], alpha=sign if part == 0 else -sign, out=into)
            real, imaginary = products.flatten(1, 2)
            _column_values(real, imaginary, to_pixels, out=lines[band].flatten(0, 1))
        return _row_values(lines.transpose(0, 1), wanted[0], rows).permute(0, 3, 1, 2)

    def weight(self, problem: Problem, grad: Tensor, x: Tensor) -> Tensor:
        axes = rows, columns = axes_of(problem)
        (n, c_out), c_in, length = grad.shape[:2], x.shape[1], columns.shortest
        grads = _row_spectrum(_channels_last(grad), rows.places, rows)
        images = _row_spectrum(_channels_last(x), rows.pixels, rows)
        lines = grads.new_empty(_half(rows), 2 * columns.taps, c_out * c_in)
        to_taps = _from_spectrum(range(columns.taps), length, lines.dtype)
        for band in _bands(axes, c_out * c_in + n * (c_out + 2 * c_in), lines):
            g = _column_spectrum(grads[:, band], columns.places, columns)
            i = _column_spectrum(images[:, band], columns.pixels, columns)
            g, i, turned = g.permute(1, 2, 0), i.transpose(0, 1), torch.cat((i[n:], -i[:n])).transpose(0, 1)
            # conj(g) i, summed over the batch and both parts at once
            real, imaginary = ((g @ part).view(-1, length, c_out * c_in) for part in (i, turned))
            _column_values(real, imaginary, to_taps, out=lines[band])
        taps = _row_values(lines[None], range(rows.taps), rows).view(rows.taps, columns.taps, c_out, c_in)
        out = x.new_zeros(problem.weight_shape)
        used_taps(out, axes).copy_(taps.permute(2, 3, 0, 1))
        return out


def multiply_adds(problem: Problem) -> int:
    """Multiply-adds of the output pass: of the transforms of images and kernels, and of the products of channels."""
    rows, columns = axes_of(problem)
    half, length = _half(rows), columns.shortest

    def transform(height: int, width: int) -> int:
        return 2 * half * width * (height + 2 * length)

    c_in, c_out = problem.in_channels, problem.out_channels
    images = c_in * transform(rows.size, columns.size) + c_out * transform(rows.outputs, columns.outputs)
    kernels = c_in * c_out * transform(rows.taps, columns.taps)
    return problem.batch * (images + 4 * c_in * c_out * half * length) + kernels


# ------------------------------------------------------------------------------------------------ transforms


def _row_spectrum(images: Tensor, places: range, axis: Axis) -> Tensor:
    """Real (N, H, W, C), row h at places[h], to (N, F, 2 W, C): of each frequency its real, then its imaginary part."""
    n, height, width, channels = images.shape
    matrix = _to_half_spectrum(places, axis.shortest, images.dtype)
    return (matrix @ images.reshape(n, height, width * channels)).view(n, _half(axis), 2 * width, channels)


def _row_values(lines: Tensor, places: range, axis: Axis) -> Tensor:
    """The inverse of `_row_spectrum`, (N, len(places), W, C)."""
    n, half, twice, channels = lines.shape
    matrix = _from_half_spectrum(places, axis.shortest, lines.dtype)
    values = matrix @ lines.reshape(n, 2 * half, twice // 2 * channels)
    return values.view(n, len(places), twice // 2, channels)


def _column_spectrum(lines: Tensor, places: range, axis: Axis) -> Tensor:
    """(N, F, 2 W, C) to (2 N, F · L, C): the real parts of all spectra, then the imaginary ones."""
    n, half, twice, channels = lines.shape
    lines = lines.reshape(n * half, twice, channels)
    spectrum = lines.new_empty(2, len(lines), axis.shortest, channels)
    for part, matrix in zip(spectrum, _to_spectrum(places, axis.shortest, lines.dtype), strict=True):
        torch.bmm(matrix.expand(len(lines), -1, -1), lines, out=part)
    return spectrum.view(2 * n, half * axis.shortest, channels)


def _column_values(real: Tensor, imaginary: Tensor, matrices: Tensor, out: Tensor) -> None:
    """The inverse of `_column_spectrum`, (B, L, C) twice to (B, 2 W, C)."""
    of_real, of_imaginary = (matrix.expand(len(real), -1, -1) for matrix in matrices)
    torch.bmm(of_real, real, out=out)
    out.baddbmm_(of_imaginary, imaginary)


def _angles(places: range, length: int, frequencies: int) -> Tensor:
    """(frequencies, len(places)) radians, in float64; places times frequencies are exact before they are rounded."""
    turns = torch.outer(torch.arange(frequencies, device="cpu"), torch.tensor(places, device="cpu")) % length
    return turns.double() * (2 * math.pi / length)


@lru_cache(maxsize=128)
def _to_half_spectrum(places: range, length: int, dtype: torch.dtype) -> Tensor:
    """(2 F, P) for F = length // 2 + 1 frequencies, real and imaginary parts in turn."""
    angle = _angles(places, length, length // 2 + 1)
    return torch.stack((angle.cos(), -angle.sin()), 1).flatten(0, 1).to(dtype)


@lru_cache(maxsize=128)
def _from_half_spectrum(places: range, length: int, dtype: torch.dtype) -> Tensor:
    """(P, 2 F); frequencies that stand for a conjugate one, too, count twice."""
    angle = _angles(places, length, length // 2 + 1)
    share = torch.full((len(angle), 1), 2 / length, dtype=angle.dtype, device="cpu")
    share[0] = 1 / length
    if length % 2 == 0:
        share[-1] = 1 / length
    return torch.stack((share * angle.cos(), -share * angle.sin()), 1).flatten(0, 1).T.to(dtype)


@lru_cache(maxsize=128)
def _to_spectrum(places: range, length: int, dtype: torch.dtype) -> Tensor:
    """(2, length, 2 P): the real and the imaginary part, of P real and P imaginary parts."""
    cos, sin = (f(_angles(places, length, length)) for f in (torch.cos, torch.sin))
    return torch.stack((torch.cat((cos, sin), 1), torch.cat((-sin, cos), 1))).to(dtype)


@lru_cache(maxsize=128)
def _from_spectrum(places: range, length: int, dtype: torch.dtype) -> Tensor:
    """(2, 2 P, length): of the real and of the imaginary part, to P real and P imaginary parts."""
    cos, sin = (f(_angles(places, length, length)).T / length for f in (torch.cos, torch.sin))
    return torch.stack((torch.cat((cos, sin)), torch.cat((-sin, cos)))).to(dtype)


# ------------------------------------------------------------------------------------------------- geometry


def _channels_last(images: Tensor) -> Tensor:
    return images.to(compute_dtype(images.dtype)).permute(0, 2, 3, 1)


def _half(axis: Axis) -> int:
    return axis.shortest // 2 + 1


def _bands(axes: Sequence[Axis], spectra: int, like: Tensor) -> Iterator[slice]:
    """Slices of the rows' frequencies, of so many that so many spectra of them take `_BAND_BYTES`."""
    rows, columns = axes
    count = max(1, _BAND_BYTES // (2 * columns.shortest * spectra * like.element_size()))
    return (slice(first, first + count) for first in range(0, _half(rows), count))
