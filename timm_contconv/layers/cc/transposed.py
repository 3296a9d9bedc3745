"""CC layers that upscale by integers: from transposed convolutions, and back.

Pixel m of the input adds tap t of a transposed convolution's kernel to pixel n = m s - padding + t of the output. In a
CC layer of scale s their distance is d = (t - padding) / s - 1/2 + 1/(2 s) (Shocher et al. 2020, Eq. 2). So every tap
is the continuous kernel at one of the distances that occur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.plain import NEGLIGIBLE
from .grid import Ratio, distances, reference_axes

__all__ = [
    "check_upscaling",
    "fit_upscaling",
    "is_upscaling",
    "phase_distances",
    "transposed_conv",
    "transposed_error",
    "transposed_like",
    "upscaling_support",
]

#: distances of the grid -> (A, B, F + 1) features
Features = Callable[[Tensor, Tensor], Tensor]


def is_upscaling(scale: Sequence[Ratio]) -> bool:
    """Whether a scale is an integer along both axes, and more than 1 along one."""
    return all(denominator == 1 for _, denominator in scale) and max(p for p, _ in scale) > 1


def check_upscaling(conv: nn.ConvTranspose2d) -> None:
    """Raise a ValueError unless the output of a transposed convolution is its stride times as large as its input."""
    if max(conv.dilation) > 1:
        raise ValueError(f"dilation={tuple(conv.dilation)}: expected 1")
    if max(conv.stride) == 1:
        raise ValueError("stride=(1, 1): expected more, because the layer's scale is the stride")
    for size, stride, padding, more in _sizes(conv):
        if size - 2 * padding + more != stride:
            raise ValueError(
                f"kernel_size={tuple(conv.kernel_size)}, stride={tuple(conv.stride)}, padding={tuple(conv.padding)},"
                f" output_padding={tuple(conv.output_padding)}: its output is not stride times as large as its input"
            )


def upscaling_support(conv: nn.ConvTranspose2d, dim: int) -> int:
    """The smallest support of a CC layer that sees all taps of a transposed convolution."""
    size, stride, padding, _ = _sizes(conv)[dim]
    support = 1
    while not set(range(size)) <= {tap + padding for tap in _taps(stride, support)}:
        support += 1
    return support


def phase_distances(scale: int, support: int) -> Tensor:
    """The distances between an output pixel and its neighbours that occur at an integer scale, ascending, (s S,)."""
    axis, _ = reference_axes(((scale, 1), (1, 1)), (support, 1))
    return distances(axis, 0, axis.numerator, torch.device("cpu")).flatten().sort().values


def _taps(scale: int, support: int) -> list[int]:
    """The tap at each of `phase_distances`, ascending, of a transposed convolution without padding."""
    return (scale * phase_distances(scale, support) + (scale - 1) / 2).round().long().tolist()


def _sizes(conv: nn.ConvTranspose2d) -> list[tuple[int, int, int, int]]:
    """Kernel size, stride, padding and output padding, for rows and columns."""
    assert not isinstance(conv.padding, str)
    return list(zip(conv.kernel_size, conv.stride, conv.padding, conv.output_padding, strict=True))


def _output_first(weight: Tensor, groups: int) -> Tensor:
    """(C_in, C_out/groups, *K) to (C_out, C_in/groups, *K), and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _indices(conv: nn.ConvTranspose2d, support: Sequence[int]) -> list[Tensor]:
    """For rows and columns, the index in the kernel of the tap at each distance; its size for none."""
    found = []
    for (size, stride, padding, _), own in zip(_sizes(conv), support, strict=True):
        taps = torch.tensor(_taps(stride, own)) + padding
        found.append(torch.where((taps >= 0) & (taps < size), taps, size))
    return found


@torch.no_grad()
def fit_upscaling(weight: Tensor, features: Features, conv: nn.ConvTranspose2d, support: Sequence[int]) -> None:
    """Set the last layer of an internal net, in place, so that the kernel is that of a transposed convolution.

    Least squares over all distances that occur; exact if the hidden layers suffice.

    Args:
        weight: (C_out, C_in/groups, F + 1), changed.
        features: the hidden layers.
        conv: the convolution.
        support: of the continuous kernel, in pixels.
    """
    rows, columns = (phase_distances(s, n).to(weight.device) for s, n in zip(conv.stride, support, strict=True))
    phi = features(rows, columns).double().flatten(0, 1)
    row_taps, column_taps = (index.to(weight.device) for index in _indices(conv, support))
    kernel = F.pad(_output_first(conv.weight.detach().double(), conv.groups), (0, 1, 0, 1))  # the last index finds 0
    target = kernel[:, :, row_taps][..., column_taps].flatten(2).flatten(0, 1).T
    solution = torch.linalg.pinv(phi[:, :-1], rtol=1e-8) @ target  # without a bias, which would act far outside
    weight.copy_(F.pad(solution, (0, 0, 0, 1)).T.view(weight.shape))


def transposed_conv(
    kernel: Tensor, bias: Tensor | None, scale: Sequence[int], support: Sequence[int], groups: int
) -> nn.ConvTranspose2d:
    """The transposed convolution with a CC layer's kernel at an integer scale.

    Args:
        kernel: (C_out, C_in/groups, s_y S_y, s_x S_x), at `phase_distances`.
        bias: (C_out,) or None.
        scale, support, groups: of the layer.
    """
    padding, more = [], []
    for dim, (s, own) in enumerate(zip(scale, support, strict=True)):
        pad = -_taps(s, own)[0]
        short = s * own - 2 * pad - s  # the kernel ends before the padding does, or behind it
        while short > 0:  # a zero in front keeps the output from being cut off
            kernel = F.pad(kernel, (0, 0, 1, 0) if dim == 0 else (1, 0))
            pad, short = pad + 1, short - 1
        padding.append(pad)
        more.append(-short)
    weight = _output_first(kernel, groups)
    arguments: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]), "stride": tuple(scale), "padding": tuple(padding),
        "output_padding": tuple(more), "groups": groups, "bias": False, "device": "meta",
    }  # fmt: skip
    conv = nn.ConvTranspose2d(weight.shape[0], weight.shape[1] * groups, **arguments)
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return conv


def _placed(conv: nn.ConvTranspose2d, kernel: Tensor, support: Sequence[int]) -> Tensor:
    """A continuous kernel's values at the taps of a transposed convolution: (C_out, C_in/groups, *its kernel size)."""
    rows, columns = (index.to(kernel.device) for index in _indices(conv, support))
    whole = kernel.new_zeros(*kernel.shape[:2], conv.kernel_size[0] + 1, conv.kernel_size[1] + 1)
    whole[:, :, rows[:, None], columns] = kernel
    return whole[..., :-1, :-1]


def transposed_like(conv: nn.ConvTranspose2d, kernel: Tensor, support: Sequence[int]) -> Tensor | None:
    """The kernel of a convolution like `conv`, (C_in, C_out/groups, *K); None if more than 1e-5 of the mass is lost."""
    placed = _placed(conv, kernel, support)
    mass = kernel.abs().sum(dtype=torch.float64)
    lost = mass - placed.abs().sum(dtype=torch.float64)
    return _output_first(placed, conv.groups) if lost <= NEGLIGIBLE * mass else None


@torch.no_grad()
def transposed_error(conv: nn.ConvTranspose2d, kernel: Tensor, support: Sequence[int]) -> float:
    """||kernel - kernel of conv|| / ||kernel of conv||."""
    wanted, kernel = _output_first(conv.weight.double(), conv.groups), kernel.double()
    placed = _placed(conv, kernel, support)
    elsewhere = (kernel.square().sum() - placed.square().sum()).clamp_min(0)
    distance = ((placed - wanted).square().sum() + elsewhere).sqrt()
    return float(distance / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
