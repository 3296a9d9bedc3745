"""The Gaussian envelope of Kobayashi 2023 as pure functions: its filter, smoothing with it, folding it into kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

__all__ = [
    "envelope_filter",
    "envelope_filter_derivative",
    "fold_envelope",
    "smooth",
    "smooth_and_convolve",
    "spread_taps",
]


def envelope_filter(variance: Tensor, size: int) -> Tensor:
    """One-dimensional Gaussian envelopes (Kobayashi 2023, Eq. 9).

    Args:
        variance: (C,) values of sigma squared, in squared pixels, above 0.
        size: k_g, odd: the number of taps.

    Returns:
        (C, size): softmax over x = -r..r of -x^2 / (2 sigma^2), r = size // 2.
    """
    return torch.softmax(-_squared_offsets(variance, size) / (2 * variance.unsqueeze(-1)), dim=-1)


def envelope_filter_derivative(variance: Tensor, size: int) -> Tensor:
    """Derivative of `envelope_filter` by the variance, the factor dg/dsigma of Kobayashi 2023, Eq. 8.

    By sigma it is 2 sigma times this.

    Args:
        variance: (C,), as for `envelope_filter`.
        size: k_g.

    Returns:
        (C, size): g[x] (x^2 - sum_xi g[xi] xi^2) / (2 sigma^4).
    """
    taps = envelope_filter(variance, size)
    squares = _squared_offsets(variance, size)
    mean = (taps * squares).sum(-1, keepdim=True)
    return taps * (squares - mean) / (2 * variance.square().unsqueeze(-1))


def smooth(
    x: Tensor, variance: Tensor, size: int, stride: Sequence[int] = (1, 1), padding_mode: str = "zeros"
) -> Tensor:
    """Smooth every channel with its envelope: along the rows' axis, then along the columns' (Kobayashi 2023, Eq. 3).

    Beyond its border the image goes on as `padding_mode` says; the envelope is not renormalised there.

    Args:
        x: (N, C, H, W) or (C, H, W).
        variance: (C,) or (1,) values of sigma squared, in squared pixels, above 0.
        size: k_g, odd: taps of each pass.
        stride: only every so many-th position of each axis is computed, from the first one on.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        (N, C, ceil(H / stride[0]), ceil(W / stride[1])), or without N: the smoothed image at these positions, in
        the memory format of x.

    Raises:
        RuntimeError: the image is too small to be reflected or wrapped by size // 2 pixels.
    """
    if x.dim() == 3:
        return smooth(x.unsqueeze(0), variance, size, stride, padding_mode).squeeze(0)
    x = _as_autocast(x)
    given, padding = x, size // 2
    if padding_mode != "zeros":
        x, padding = F.pad(given, (padding,) * 4, mode=padding_mode), 0
    variance = variance.expand(x.shape[1])
    if torch.is_grad_enabled() and (x.requires_grad or variance.requires_grad):
        y = _Smooth.apply(x, variance, size, tuple(stride), padding)
    else:
        y = _two_passes(x, envelope_filter(variance, size), stride, padding)
    return _in_layout_of(given, y)


def smooth_and_convolve(
    x: Tensor,
    variance: Tensor,
    size: int,
    taken: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`smooth` an image that needs no gradient itself, as a network's first layer gets it, and convolve it.

    The same as one after the other, without the gradient of the image, which there serves sigma alone: by
    Kobayashi 2023, Eq. 8, and because the convolution is linear, sigma's gradient is the inner product, channel by
    channel, of the weight and of what the weight's gradient would be for the image dg/dsigma * X. In a ResNet's
    stem, on a CPU, that takes a quarter of the time.

    Args:
        x, variance, size: as for `smooth`, with zeros beyond the border.
        taken: `stride` of `smooth`.
        weight, stride, padding, dilation, groups: as for `torch.nn.functional.conv2d`.
    """
    if x.dim() == 3:
        x = x.unsqueeze(0)
        return smooth_and_convolve(x, variance, size, taken, weight, stride, padding, dilation, groups).squeeze(0)
    x, weight = _as_autocast(x), _as_autocast(weight)
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return _SmoothConvolve.apply(x, variance.expand(x.shape[1]), weight, size, tuple(taken), settings)


class _Smooth(torch.autograd.Function):
    """Smoothing whose backward path is Kobayashi 2023, Eq. 7 and 8.

    Autograd would take the gradient of all taps, which costs several times the smoothing itself on strided
    passes; of sigma it is one more smoothing, with the filter's derivative. Everything in `backward` is
    differentiable, so second derivatives are there too. Only the image is kept for it: the first pass is repeated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, variance: Tensor, size: int, stride: tuple[int, ...], padding: int) -> Tensor:
        return _two_passes(x, envelope_filter(variance, size), stride, padding)

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
        half_grad = _pass_backward(grad, taps, 1, stride[1], padding, x.shape[3])
        grad_x = grad_variance = None
        if ctx.needs_input_grad[0]:
            grad_x = _pass_backward(half_grad, taps, 0, stride[0], padding, x.shape[2])
        if ctx.needs_input_grad[1]:
            derivative = envelope_filter_derivative(variance, size)
            half = _pass(x, taps, 0, stride[0], padding)
            by_rows = _channel_products(_pass(x, derivative, 0, stride[0], padding), half_grad, variance.dtype)
            by_columns = _channel_products(_pass(half, derivative, 1, stride[1], padding), grad, variance.dtype)
            grad_variance = by_rows + by_columns
        return grad_x, grad_variance, None, None, None


class _SmoothConvolve(torch.autograd.Function):
    """What `smooth_and_convolve` says; differentiable to any order, as `_Smooth` is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, variance: Tensor, weight: Tensor, size: int, taken: tuple[int, ...], settings: tuple[Any, ...]
    ) -> Tensor:
        smoothed = _two_passes(x, envelope_filter(variance, size), taken, size // 2)
        return F.conv2d(_in_layout_of(x, smoothed), weight, None, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, variance, weight, *ctx.settings = inputs
        ctx.save_for_backward(x, variance, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, variance, weight = ctx.saved_tensors
        size, taken, settings = ctx.settings
        taps, derivative = envelope_filter(variance, size), envelope_filter_derivative(variance, size)
        half = _pass(_fast_layout(x), taps, 0, taken[0], size // 2)
        smoothed = _pass(half, taps, 1, taken[1], size // 2)
        grad_x = grad_variance = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_smoothed = conv2d_input(smoothed.shape, weight, grad, *settings)
            half_grad = _pass_backward(grad_smoothed, taps, 1, taken[1], size // 2, x.shape[3])
            grad_x = _pass_backward(half_grad, taps, 0, taken[0], size // 2, x.shape[2])
        if ctx.needs_input_grad[1]:
            by_rows = _pass(_fast_layout(x), derivative, 0, taken[0], size // 2)
            changed = _pass(by_rows, taps, 1, taken[1], size // 2) + _pass(half, derivative, 1, taken[1], size // 2)
            products = weight * conv2d_weight(changed, weight.shape, grad, *settings)
            grad_variance = products.unflatten(0, (settings[-1], -1)).sum((1, 3, 4), dtype=variance.dtype).flatten()
        if ctx.needs_input_grad[2]:
            grad_weight = conv2d_weight(smoothed, weight.shape, grad, *settings)
        return grad_x, grad_variance, grad_weight, None, None, None


def fold_envelope(weight: Tensor, taps: Tensor, axes_spread: Sequence[int] = (1, 1)) -> Tensor:
    """Convolve kernels with separable envelopes: w = g * f (Kobayashi 2023, Eq. 1).

    Args:
        weight: (C_out, C_in/groups, K_y, K_x) kernels f, not dilated.
        taps: (C_out, C_in/groups, k_g) envelopes g, one for each kernel.
        axes_spread: distance of the taps along each axis, in pixels.

    Returns:
        (C_out, C_in/groups, K_y + (k_g - 1) axes_spread[0], K_x + (k_g - 1) axes_spread[1]).
    """
    kernels = weight.flatten(0, 1).unsqueeze(0)
    filters = taps.flatten(0, 1)[None, :, None]
    for axis, distance in enumerate(axes_spread):
        spread = spread_taps(filters, (1, distance))[0, :, 0]
        kernels = _pass(kernels, spread, axis, 1, spread.shape[-1] - 1)
    return kernels.squeeze(0).unflatten(0, weight.shape[:2])


def spread_taps(kernel: Tensor, distances: Sequence[int]) -> Tensor:
    """A dilated kernel written out: zeros between the taps.

    Args:
        kernel: (A, B, K_y, K_x).
        distances: distance of the taps along each axis, in pixels.

    Returns:
        (A, B, (K_y - 1) distances[0] + 1, (K_x - 1) distances[1] + 1).
    """
    sizes = [(size - 1) * distance + 1 for size, distance in zip(kernel.shape[2:], distances, strict=True)]
    spread = kernel.new_zeros(*kernel.shape[:2], *sizes)
    spread[..., :: distances[0], :: distances[1]] = kernel
    return spread


def _two_passes(x: Tensor, taps: Tensor, stride: Sequence[int], padding: int) -> Tensor:
    return _pass(_pass(_fast_layout(x), taps, 0, stride[0], padding), taps, 1, stride[1], padding)


def _pass(x: Tensor, taps: Tensor, axis: int, stride: int, padding: int) -> Tensor:
    """Depthwise convolution of x, (N, C, H, W), with taps, (C, k), along one spatial axis."""
    kernel = taps.to(x.dtype)[:, None, :, None] if axis == 0 else taps.to(x.dtype)[:, None, None, :]
    return F.conv2d(x, kernel, None, _along(axis, stride, 1), _along(axis, padding, 0), 1, taps.shape[0])


def _pass_backward(grad: Tensor, taps: Tensor, axis: int, stride: int, padding: int, size: int) -> Tensor:
    """Gradient of `_pass` for its input, which had `size` pixels along the axis."""
    kernel = taps.to(grad.dtype)[:, None, :, None] if axis == 0 else taps.to(grad.dtype)[:, None, None, :]
    missing = size - ((grad.shape[2 + axis] - 1) * stride + taps.shape[1] - 2 * padding)
    return F.conv_transpose2d(
        grad, kernel, None, _along(axis, stride, 1), _along(axis, padding, 0), _along(axis, missing, 0), taps.shape[0]
    )


def _along(axis: int, value: int, other: int) -> tuple[int, int]:
    return (value, other) if axis == 0 else (other, value)


def _channel_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Inner product of two images, channel by channel: (C,)."""
    return (a * b).sum((0, 2, 3), dtype=dtype)


def _fast_layout(x: Tensor) -> Tensor:
    """Channels last on the CPU, where a depthwise convolution of large images is many times faster in it."""
    if x.device.type != "cpu":
        return x
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y contiguous unless x is in channels last; asked so because vmap refuses to be asked for the format by name."""
    return y if x.permute(0, 2, 3, 1).is_contiguous() else y.contiguous()


def _as_autocast(x: Tensor) -> Tensor:
    """x as autocast would give it to a convolution, so that both directions compute in one dtype."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _squared_offsets(like: Tensor, size: int) -> Tensor:
    """x^2 for x = -r..r."""
    return (torch.arange(size, device=like.device, dtype=like.dtype) - size // 2).square()
