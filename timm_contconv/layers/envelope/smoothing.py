"""The smoothing of images with Gaussian envelopes, and its gradients (Kobayashi 2023, Eq. 3, 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from ...ops import plain_only
from ...ops.autocast import autocast_dtype
from .gaussian import envelope_filter, envelope_filter_derivative

__all__ = ["filter_axis", "smooth", "smooth_and_convolve"]


def smooth(
    x: Tensor, variance: Tensor, size: int, stride: Sequence[int] = (1, 1), padding_mode: str = "zeros"
) -> Tensor:
    """Smooth every channel with its envelope, first along H, then along W (Kobayashi 2023, Eq. 3).

    `padding_mode` continues the image beyond its border; the envelope is not renormalised there.

    Args:
        x: (N, C, H, W) or (C, H, W).
        variance: (C,) or (1,) values of sigma squared, in squared pixels, above 0.
        size: k_g, odd: taps of each pass.
        stride: steps between the computed positions of each axis, from the first one on.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        (N, C, ceil(H / stride[0]), ceil(W / stride[1])), or without N: the smoothed image at these positions, in
        the memory format of x.

    Raises:
        RuntimeError: the image is too small to be reflected or wrapped by size // 2 pixels.
    """
    if x.dim() == 3:
        return smooth(x.unsqueeze(0), variance, size, stride, padding_mode).squeeze(0)
    x = x.to(autocast_dtype(x))  # as autocast gives it to a convolution: forward and backward compute in one dtype
    given, padding = x, size // 2
    if padding_mode != "zeros":
        x, padding = F.pad(x, (padding,) * 4, mode=padding_mode), 0
    variance = variance.expand(x.shape[1])
    has_gradient = torch.is_grad_enabled() and (x.requires_grad or variance.requires_grad)
    passes = _Smooth.apply if has_gradient and not plain_only() else _two_passes
    return _in_layout_of(given, passes(x, variance, size, tuple(stride), padding))


def smooth_and_convolve(x: Tensor, variance: Tensor, size: int, stride: Sequence[int], conv: nn.Conv2d) -> Tensor:
    """`smooth` and convolve an image that needs no gradient, such as the input of a network's first layer.

    Only sigma would need the gradient of the smoothed image, so it is not computed. The convolution is linear; by
    Kobayashi 2023, Eq. 8, sigma's gradient is, for each channel, the inner product of the weight and the weight's
    gradient for the image dg/dsigma * X. In a ResNet's stem, on a CPU, this takes a quarter of the time.

    Args:
        x, variance, size, stride: as for `smooth`; the border is padded with zeros.
        conv: a plain convolution; its padding is given in pixels, and of zeros.
    """
    if x.dim() == 3:
        return smooth_and_convolve(x.unsqueeze(0), variance, size, stride, conv).squeeze(0)
    x, weight = x.to(autocast_dtype(x)), conv.weight.to(autocast_dtype(conv.weight))
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    y = _SmoothConvolve.apply(x, variance.expand(x.shape[1]), weight, size, tuple(stride), settings)
    return y if conv.bias is None else y + conv.bias.to(y.dtype).view(-1, 1, 1)


class _Smooth(torch.autograd.Function):
    """`_two_passes` with the gradients of Kobayashi 2023, Eq. 7 and 8.

    Autograd would compute the gradient of all taps, which on strided passes costs several times the smoothing. Here
    sigma's gradient is one more smoothing, with the filter's derivative. `backward` is differentiable, so second
    derivatives work. It keeps only the image, and computes the first pass again.
    """

    @staticmethod
    def forward(x: Tensor, variance: Tensor, size: int, stride: tuple[int, ...], padding: int) -> Tensor:
        return _two_passes(x, variance, size, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, variance, *ctx.settings = inputs
        ctx.save_for_backward(x, variance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, variance = ctx.saved_tensors
        size, stride, padding = ctx.settings
        taps = envelope_filter(variance, size)
        x, grad = _fast_layout(x), _fast_layout(grad)
        half_grad = _filter_axis_backward(grad, taps, 1, stride[1], padding, x.shape[3])
        grad_x = grad_variance = None
        if ctx.needs_input_grad[0]:
            grad_x = _filter_axis_backward(half_grad, taps, 0, stride[0], padding, x.shape[2])
        if ctx.needs_input_grad[1]:
            derivative = envelope_filter_derivative(variance, size)
            half = filter_axis(x, taps, 0, stride[0], padding)
            by_rows = filter_axis(x, derivative, 0, stride[0], padding) * half_grad
            by_columns = filter_axis(half, derivative, 1, stride[1], padding) * grad
            grad_variance = by_rows.sum((0, 2, 3), dtype=variance.dtype)
            grad_variance = grad_variance + by_columns.sum((0, 2, 3), dtype=variance.dtype)
        return grad_x, grad_variance, None, None, None


class _SmoothConvolve(torch.autograd.Function):
    """`smooth_and_convolve` without the bias; differentiable to any order in variance and weight."""

    @staticmethod
    def forward(
        x: Tensor, variance: Tensor, weight: Tensor, size: int, stride: tuple[int, ...], settings: tuple[Any, ...]
    ) -> Tensor:
        smoothed = _two_passes(x, variance, size, stride, size // 2)
        return F.conv2d(_in_layout_of(x, smoothed), weight, None, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, variance, weight, *ctx.settings = inputs
        ctx.save_for_backward(x, variance, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, variance, weight = ctx.saved_tensors
        size, (row_stride, column_stride), settings = ctx.settings
        x, padding = _fast_layout(x), size // 2
        taps, derivative = envelope_filter(variance, size), envelope_filter_derivative(variance, size)
        half = filter_axis(x, taps, 0, row_stride, padding)
        grad_variance = grad_weight = None
        if ctx.needs_input_grad[1]:
            by_rows = filter_axis(x, derivative, 0, row_stride, padding)
            changed = filter_axis(by_rows, taps, 1, column_stride, padding)
            changed = changed + filter_axis(half, derivative, 1, column_stride, padding)
            products = weight * conv2d_weight(changed, weight.shape, grad, *settings)
            grad_variance = products.unflatten(0, (settings[-1], -1)).sum((1, 3, 4), dtype=variance.dtype).flatten()
        if ctx.needs_input_grad[2]:
            smoothed = filter_axis(half, taps, 1, column_stride, padding)
            grad_weight = conv2d_weight(smoothed, weight.shape, grad, *settings)
        return None, grad_variance, grad_weight, None, None, None


def _two_passes(x: Tensor, variance: Tensor, size: int, stride: Sequence[int], padding: int) -> Tensor:
    taps = envelope_filter(variance, size)
    half = filter_axis(_fast_layout(x), taps, 0, stride[0], padding)
    return filter_axis(half, taps, 1, stride[1], padding)


def filter_axis(x: Tensor, taps: Tensor, axis: int, stride: int, padding: int) -> Tensor:
    """Correlate every channel with its own filter along one spatial axis; the border is padded with zeros.

    Args:
        x: (N, C, H, W).
        taps: (C, k).
        axis: 0 for H, 1 for W.
        stride, padding: along that axis.
    """
    kernel = _along_axis(taps, axis, x.dtype)
    return F.conv2d(x, kernel, None, _pair(axis, stride, 1), _pair(axis, padding, 0), 1, taps.shape[0])


def _filter_axis_backward(grad: Tensor, taps: Tensor, axis: int, stride: int, padding: int, size: int) -> Tensor:
    """Gradient of `filter_axis` by its input, which had `size` pixels along the axis."""
    kernel = _along_axis(taps, axis, grad.dtype)
    missing = size - ((grad.shape[2 + axis] - 1) * stride + taps.shape[1] - 2 * padding)
    pairs = (_pair(axis, stride, 1), _pair(axis, padding, 0), _pair(axis, missing, 0))
    return F.conv_transpose2d(grad, kernel, None, *pairs, taps.shape[0])


def _along_axis(taps: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    return taps.to(dtype)[:, None, :, None] if axis == 0 else taps.to(dtype)[:, None, None, :]


def _pair(axis: int, value: int, other: int) -> tuple[int, int]:
    return (value, other) if axis == 0 else (other, value)


def _fast_layout(x: Tensor) -> Tensor:
    """x in channels last on the CPU: there depthwise convolutions of large images are many times faster."""
    if x.device.type != "cpu":
        return x
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y contiguous unless x is in channels last. The test permutes x because vmap refuses `memory_format`."""
    return y if x.permute(0, 2, 3, 1).is_contiguous() else y.contiguous()
