"""CC layers at scales with few phases: one ordinary convolution for each (Shocher et al. 2020, Block 4).

At a scale p/q the distances repeat every p output pixels. So there are p_y * p_x kernels, and one strided convolution
computes all outputs of one kernel. At scale 1/k there is one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import conv
from ..core.padding import pad_image
from .grid import ResizedAxis
from .plan import Plan

__all__ = ["apply_kernels", "as_images", "interleaved_conv", "strided_conv"]


def apply_kernels(x: Tensor, kernels: Tensor, bias: Tensor | None, plan: Plan, groups: int) -> Tensor:
    """The layer's output, from the kernels of all phases.

    Args:
        x: (N, C_in, H, W) images.
        kernels: (p_y, p_x, C_out, C_in/groups, S_y, S_x).
        bias: (C_out,) or None.
        plan: the geometry.
        groups: as for `nn.Conv2d`.

    Returns:
        (N, C_out, H', W').
    """
    if plan.phases == 1:
        return strided_conv(x, kernels[0, 0], bias, plan, groups)
    return interleaved_conv(x, kernels, bias, plan, groups)


def strided_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, plan: Plan, groups: int) -> Tensor:
    """The layer at scales 1/k: an ordinary convolution with one kernel, (C_out, C_in/groups, S_y, S_x)."""
    rows, columns = plan.axes
    padding = plan.padding
    if padding is None:
        x, padding = pad_image(x, (rows.margins(), columns.margins()), plan.padding_mode), (0, 0)
    return conv(x, kernel, bias, (rows.denominator, columns.denominator), padding, groups)


def interleaved_conv(x: Tensor, kernels: Tensor, bias: Tensor | None, plan: Plan, groups: int) -> Tensor:
    """One strided convolution per phase; their outputs interleaved. Arguments as for `apply_kernels`."""
    axes = plan.axes
    stride, periods = (axes[0].denominator, axes[1].denominator), (axes[0].numerator, axes[1].numerator)
    padded = pad_image(x, [_phase_margins(axis) for axis in axes], plan.padding_mode)
    (tops, counts, height), (lefts, widths, width) = (_windows(axis) for axis in axes)
    phases = [
        conv(padded[..., top : top + height, left : left + width], kernels[i, j], bias, stride, (0, 0), groups)
        for i, top in enumerate(tops)
        for j, left in enumerate(lefts)
    ]
    y = torch.stack(phases).view(*periods, *x.shape[:1], kernels.shape[2], counts, widths)
    y = y.permute(2, 3, 4, 0, 5, 1).reshape(*y.shape[2:4], counts * periods[0], widths * periods[1])
    rows, columns = (torch.arange(axis.out_size, device=x.device) for axis in axes)
    return as_images(y[:, :, rows][..., columns], x)


def _windows(axis: ResizedAxis) -> tuple[list[int], int, int]:
    """The start of each phase's neighbours in the padded image; outputs per phase, and pixels that they read."""
    starts = [axis.first(i) - axis.first(0) for i in range(axis.numerator)]
    count = -(-axis.out_size // axis.numerator)
    return starts, count, (count - 1) * axis.denominator + axis.support


def _phase_margins(axis: ResizedAxis) -> tuple[int, int]:
    """Pixels to pad before and after the input, so that all phases have equally many outputs."""
    before, _ = axis.margins()
    starts, _, length = _windows(axis)
    return before, starts[-1] + length - before - axis.size


def as_images(y: Tensor, x: Tensor) -> Tensor:
    """y, (N, C, H, W), in the memory format of x."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
