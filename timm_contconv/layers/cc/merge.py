"""CC layers from plain convolutions, strided or transposed, and back: the taps that both have, and the kernels of each.

With tap t of its kernel, output pixel n of a strided convolution reads input pixel m = n s + t - padding. In a
transposed one, output pixel n = m s + t - padding does. So every tap is the continuous kernel at one of the distances
between m and n that occur (Shocher et al. 2020, Eq. 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.plain import NEGLIGIBLE, PlainConv, has_same_padding, plain_conv
from .grid import Ratio, ResizedAxis, Rounding, distances, neighbours, resized_axes, scale_text

__all__ = [
    "Conv",
    "common_plateaus",
    "covering_support",
    "distance_from",
    "fit_last_layer",
    "kernel_like",
    "merged_conv",
    "require_scale",
    "rounding_of",
]

Conv = PlainConv | nn.ConvTranspose2d
#: vertical (A,) and horizontal (B,) distances -> the continuous kernel, (C_out, C_in/groups, A, B)
KernelAt = Callable[[Tensor, Tensor], Tensor]


def rounding_of(conv: Conv) -> Rounding:
    """The rounding of size · scale in the output size of a convolution; of a transposed one any does.

    Raises:
        ValueError: it is neither ceil nor floor for all sizes; or a transposed convolution can't be replaced.
    """
    if isinstance(conv, nn.ConvTranspose2d):
        _check_upscaling(conv)
        return "ceil"
    for rounding in ("ceil", "floor"):
        if all(_rounds(conv, dim, rounding) for dim in range(2)):
            return rounding
    raise ValueError(
        f"kernel_size={tuple(conv.kernel_size)}, stride={tuple(conv.stride)}, padding={conv.padding!r}: its output has"
        " neither ceil nor floor of size / stride pixels for every size, which an output resized by 1/stride has"
    )


def _rounds(conv: PlainConv, dim: int, rounding: Rounding) -> bool:
    kernel_size, stride = conv.kernel_size[dim], conv.stride[dim]
    if has_same_padding(conv):
        return rounding == "ceil" or stride == 1
    margin = 2 * _padding(conv, dim) - kernel_size + stride  # output: floor((size + margin) / stride)
    return margin == (stride - 1 if rounding == "ceil" else 0)


def _check_upscaling(conv: nn.ConvTranspose2d) -> None:
    if max(conv.dilation) > 1:
        raise ValueError(f"dilation={tuple(conv.dilation)}: expected 1")
    if max(conv.stride) == 1:
        raise ValueError("stride=(1, 1): expected more, because the layer's scale is the stride")
    for dim, (size, stride, more) in enumerate(zip(conv.kernel_size, conv.stride, conv.output_padding, strict=True)):
        if size - 2 * _padding(conv, dim) + more != stride:
            raise ValueError(
                f"kernel_size={tuple(conv.kernel_size)}, stride={tuple(conv.stride)}, padding={conv.padding},"
                f" output_padding={tuple(conv.output_padding)}: its output is not stride times as large as its input"
            )


def require_scale(scale: Sequence[Ratio], conv: Conv | None = None) -> None:
    """Raise a ValueError if the scale is not that of `conv`, or, without one, not 1/k for any integer k."""
    if conv is None:
        wanted, expected = [(1, denominator) for _, denominator in scale], "1/k, k an integer"
    else:
        wanted, stride = [_scale(conv, dim) for dim in (0, 1)], tuple(conv.stride)
        expected = f"{stride}, the stride" if _is_transposed(conv) else f"1/stride, stride {stride}"
    if list(scale) != wanted:
        raise ValueError(
            f"scale={scale_text(scale)}: expected {expected}; set `layer.scale` before merging, or leave the model"
            " unmerged: tcc.export(..., merge=False)"
        )


# ---- from a convolution


def covering_support(conv: Conv, dim: int, rounding: Rounding) -> int:
    """The smallest support whose neighbours hold all pixels that the convolution reads."""
    support, taps = 1, set(range(conv.kernel_size[dim]))
    while any(taps - set(_taps_of(conv, dim, axis)[1].tolist()) for axis in _axes(conv, dim, support, rounding)):
        support += 1
    return support


def common_plateaus(
    convs: Sequence[PlainConv], dim: int, support: int, rounding: Rounding
) -> list[tuple[float, float]] | None:
    """Plateaus on each of which convolutions read one pixel, at all distances of `resized_axes`; None if impossible.

    Args:
        convs: the convolutions, strided ones.
        dim: 0 for rows, 1 for columns.
        support: number of plateaus.
        rounding: of the layer.

    Returns:
        As `grid.plateaus`, which holds for all kernels. It pairs the pixels of images of even and odd sizes as they
        stand in the support, while a convolution may read the next ones.
    """
    found = [_plateaus_of(conv, dim, support, rounding) for conv in convs]
    return found[0] if all(plateaus == found[0] for plateaus in found) else None


def _plateaus_of(conv: PlainConv, dim: int, support: int, rounding: Rounding) -> list[tuple[float, float]] | None:
    where, taps = _all_taps_of(conv, dim, support, rounding)
    pairs = sorted(zip(where.tolist(), taps.tolist(), strict=True), reverse=True)
    runs = [(tap, [d for d, _ in run]) for tap, run in itertools.groupby(pairs, key=lambda pair: pair[1])]
    if len({tap for tap, _ in runs if tap >= 0}) < sum(tap >= 0 for tap, _ in runs):
        return None
    while len(runs) > support:  # beyond the last plateau a kernel falls to 0 anyway
        runs = runs[1:] if runs[0][0] < 0 else runs[:-1]
    plateaus = [(min(distances), max(distances)) for _, distances in runs]
    while len(plateaus) < support:
        plateaus.append((plateaus[-1][0] - 1, plateaus[-1][0] - 1))
    return plateaus


@torch.no_grad()
def fit_last_layer(
    weight: Tensor,
    features: Callable[[Tensor, Tensor], Tensor],
    conv: Conv,
    support: Sequence[int],
    rounding: Rounding,
) -> None:
    """Set the last layer of an internal net, in place, so that the kernel is that of a convolution.

    Least squares over all distances that occur; exact if the hidden layers suffice. The layer's bias, the last feature,
    is used only if the other features are not exact, and never for a transposed convolution: it would act far outside
    of the kernel.

    Args:
        weight: (C_out, C_in/groups, F + 1), changed.
        features: the hidden layers.
        conv: the convolution.
        support: of the continuous kernel, in pixels.
        rounding: of the layer.
    """
    (rows, row_taps), (columns, column_taps) = (_all_taps_of(conv, dim, support[dim], rounding) for dim in (0, 1))
    phi = features(rows.to(weight.device), columns.to(weight.device)).double().flatten(0, 1)
    kernel = F.pad(_kernel(conv).double(), (0, 1, 0, 1))  # index -1 finds a zero
    target = kernel[:, :, row_taps][..., column_taps].flatten(2).flatten(0, 1).T
    solution = _least_squares(phi[:, :-1], target)
    left = target - phi[:, :-1] @ solution
    needs_bias = not _is_transposed(conv) and left.norm() > 1e-9 * target.norm()
    solution = _least_squares(phi, target) if needs_bias else F.pad(solution, (0, 0, 0, 1))
    weight.copy_(solution.T.view(weight.shape))


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """The smallest x with the least ||a x - b||, also if a is rank-deficient."""
    return torch.linalg.pinv(a, rtol=1e-8) @ b


# ---- to a convolution


def merged_conv(
    kernel_at: KernelAt,
    bias: Tensor | None,
    axes: Sequence[ResizedAxis],
    rounding: Rounding,
    padding_mode: str,
    groups: int,
    transposed: bool,
) -> Conv:
    """The convolution with a CC layer's kernel at scale 1/stride; or, transposed, at scale stride.

    Args:
        kernel_at: the continuous kernel.
        bias: (C_out,) or None.
        axes: rows and columns of an image whose size is a multiple of the stride.
        rounding, padding_mode, groups: of the layer.
        transposed: only with zeros as padding.
    """
    (rows, row_taps), (columns, column_taps) = (_taps(axis, transposed) for axis in axes)
    first, stride = (int(row_taps[0]), int(column_taps[0])), [axis.numerator * axis.denominator for axis in axes]
    kernel = kernel_at(rows, columns)
    around = [_zeros_around(kernel.shape[2 + dim], first[dim], stride[dim]) for dim in (0, 1)]
    kernel = F.pad(kernel, [*around[1], *around[0]])
    pads = [before - index for (before, _), index in zip(around, first, strict=True)]
    size = kernel.shape[2:]
    if transposed:
        return _transposed_conv(_output_first(kernel, groups), bias, stride, pads, groups)
    short = any(2 * p - k != -1 for p, k in zip(pads, size, strict=True))  # fewer than ceil(size / stride) outputs
    even = all((k - s) % 2 == 0 for k, s in zip(size, stride, strict=True))
    same = rounding != "floor" and short and even and padding_mode == "zeros"
    padding: str | list[int] = "same" if same else pads
    return plain_conv(kernel, bias, stride=stride, padding=padding, groups=groups, padding_mode=padding_mode)


def _zeros_around(size: int, first: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a kernel whose taps are first, first + 1, ..., so that one padding fits both sides.

    A kernel smaller than the stride may start inside the image. A kernel that ends before the padding does, as an even
    one with stride 1, would give one output too many. A transposed one that ends too far behind it gives one too few.
    """
    return max(first, size + 2 * first - stride, 0), max(first, 1 - 2 * first - size, 0)


def _transposed_conv(
    weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> nn.ConvTranspose2d:
    """One with copies of a kernel, (C_in, C_out/groups, *K), and a bias, whose output is stride times as large."""
    size = weight.shape[2:]
    more = [2 * p + s - k for p, s, k in zip(padding, stride, size, strict=True)]
    settings: dict[str, Any] = {
        "kernel_size": tuple(size), "stride": tuple(stride), "padding": tuple(padding), "output_padding": tuple(more),
        "groups": groups, "bias": False, "device": "meta",
    }  # fmt: skip
    conv = nn.ConvTranspose2d(weight.shape[0], weight.shape[1] * groups, **settings)
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return conv


@torch.no_grad()
def kernel_like(conv: Conv, kernel_at: KernelAt, axes: Sequence[ResizedAxis]) -> Tensor | None:
    """The kernel that gives a convolution like `conv` the output of a continuous kernel.

    Args:
        conv: the convolution; it may be on the meta device.
        kernel_at: the continuous kernel.
        axes: rows and columns of an image whose size is a multiple of the stride.

    Returns:
        In the shape of conv's kernel; None if more than 1e-5 of the mass would be lost.
    """
    kernel, placed = _in_place_of(conv, kernel_at, axes)
    mass = kernel.abs().sum(dtype=torch.float64)
    lost = mass - placed.abs().sum(dtype=torch.float64)
    if lost > NEGLIGIBLE * mass:
        return None
    return (_output_first(placed, conv.groups) if _is_transposed(conv) else placed).contiguous()


@torch.no_grad()
def distance_from(conv: Conv, kernel_at: KernelAt, support: Sequence[int], rounding: Rounding) -> float:
    """||kernel - kernel of conv|| / ||kernel of conv||, the largest for any size of the image."""
    wanted = _kernel(conv).double()
    errors = []
    for axes in itertools.product(*(_axes(conv, dim, support[dim], rounding) for dim in (0, 1))):
        kernel, placed = (values.double() for values in _in_place_of(conv, kernel_at, axes))
        elsewhere = (kernel.square().sum() - placed.square().sum()).clamp_min(0)
        distance = ((placed - wanted).square().sum() + elsewhere).sqrt()
        errors.append(float(distance / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)))
    return max(errors)


def _in_place_of(conv: Conv, kernel_at: KernelAt, axes: Sequence[ResizedAxis]) -> tuple[Tensor, Tensor]:
    """A continuous kernel's values at all distances, and those at the taps of a convolution's kernel; else 0.

    Both have the output channels first: (C_out, C_in/groups, ...).
    """
    (rows, row_taps), (columns, column_taps) = (_taps_of(conv, dim, axis) for dim, axis in enumerate(axes))
    kernel = kernel_at(rows, columns)
    placed = kernel.new_zeros(*kernel.shape[:2], *(size + 1 for size in conv.kernel_size))  # the last, -1, is for none
    placed[:, :, row_taps.unsqueeze(1), column_taps] = kernel
    return kernel, placed[..., :-1, :-1]


# ---- taps


def _taps(axis: ResizedAxis, transposed: bool) -> tuple[Tensor, Tensor]:
    """(D,) distances at scale 1/s, or s, and the tap at each in a convolution without padding; taps rise by one."""
    cpu, periods = torch.device("cpu"), axis.numerator
    read = periods * neighbours(axis, 0, periods, cpu)
    taps = read - axis.denominator * torch.arange(periods, device=cpu).unsqueeze(1)
    taps, order = (-taps if transposed else taps).flatten().sort()
    return distances(axis, 0, periods, cpu).flatten()[order], taps


def _taps_of(conv: Conv, dim: int, axis: ResizedAxis) -> tuple[Tensor, Tensor]:
    """(D,) distances, and the index in a convolution's kernel of the tap at each; -1 if it has none there."""
    where, taps = _taps(axis, _is_transposed(conv))
    size, padding = conv.kernel_size[dim], _padding(conv, dim)
    if isinstance(conv, PlainConv) and has_same_padding(conv):
        padding = max((axis.out_size - 1) * conv.stride[dim] + size - axis.size, 0) // 2
    index = taps + padding
    return where, index.where((index >= 0) & (index < size), -1)


def _all_taps_of(conv: Conv, dim: int, support: int, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """`_taps_of` for images of any size."""
    found = [_taps_of(conv, dim, axis) for axis in _axes(conv, dim, support, rounding)]
    where, taps = zip(*found, strict=True)
    return torch.cat(where), torch.cat(taps)


def _axes(conv: Conv, dim: int, support: int, rounding: Rounding) -> list[ResizedAxis]:
    return resized_axes(_scale(conv, dim), support, rounding)


def _scale(conv: Conv, dim: int) -> Ratio:
    return (conv.stride[dim], 1) if _is_transposed(conv) else (1, conv.stride[dim])


def _is_transposed(conv: Conv) -> bool:
    return isinstance(conv, nn.ConvTranspose2d)


def _padding(conv: Conv, dim: int) -> int:
    return 0 if isinstance(conv.padding, str) else conv.padding[dim]


def _kernel(conv: Conv) -> Tensor:
    """(C_out, C_in/groups, *K)."""
    return _output_first(conv.weight, conv.groups) if _is_transposed(conv) else conv.weight


def _output_first(weight: Tensor, groups: int) -> Tensor:
    """(C_in, C_out/groups, *K) to (C_out, C_in/groups, *K), and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
