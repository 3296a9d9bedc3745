"""A convolution with a Gaussian envelope as plain convolutions: one after the other, or folded into one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.problem import compute_dtype
from .gaussian import envelope_filter, fold_envelope, spread_taps

if TYPE_CHECKING:
    from .envelope import GaussianEnvelopeConv2d

__all__ = ["all_delta", "dense_conv", "dense_kernel", "plain_convs"]

CONV_ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode"),
)
#: below this sigma squared, exp(-1 / (2 sigma^2)) underflows to 0: the filter is a delta and so is its gradient 0
DELTA_VARIANCE = {torch.float32: 1 / 208, torch.float64: 1 / 1500}


def all_delta(sigma: Tensor) -> bool:
    """Whether the envelopes of these parameters (sigma^2 = softplus(s)) are deltas, bit for bit."""
    exact = sigma.detach().to(compute_dtype(sigma.dtype))
    return bool((F.softplus(exact) < DELTA_VARIANCE[exact.dtype]).all())


def plain_convs(layer: GaussianEnvelopeConv2d) -> nn.Module:
    """The layer as a sequence of plain convolutions; `GaussianEnvelopeConv2d.to_conv` says what holds."""
    if _is_plain(layer):
        return _conv(layer, layer.weight, layer.bias, layer.stride)
    taken, left = layer.split_stride()
    passes = [_pass(layer, axis, stride) for axis, stride in enumerate(taken)]
    if layer.order == "before":
        steps = nn.Sequential(*passes, _conv(layer, layer.weight, layer.bias, left))
    else:
        passes[1].bias = _copied(layer.bias)
        steps = nn.Sequential(_conv(layer, layer.weight, None, left), *passes)
    for name in CONV_ATTRIBUTES:  # models read these off what they hold as a convolution
        setattr(steps, name, getattr(layer, name))
    return steps.train(layer.training)


def dense_conv(layer: GaussianEnvelopeConv2d) -> nn.Module:
    """The layer as one convolution; `GaussianEnvelopeConv2d.to_dense_conv` says what holds."""
    if _is_plain(layer):
        return _conv(layer, layer.weight, layer.bias, layer.stride)
    margins = [layer.inference_size // 2 * distance for distance in _spread(layer)]
    return _conv(
        layer, dense_kernel(layer), layer.bias, layer.stride, padding=_dense_padding(layer, margins), dilation=1
    )


@torch.no_grad()
def dense_kernel(layer: GaussianEnvelopeConv2d) -> Tensor:
    """(C_out, C_in/groups, H, W): the convolution's kernel, its dilation spread out, with the envelope folded in."""
    return fold_envelope(spread_taps(layer.weight, layer.dilation), _taps_per_kernel(layer), _spread(layer))


def _spread(layer: GaussianEnvelopeConv2d) -> tuple[int, ...]:
    """Pixels of the input between neighbours in the smoothed image."""
    return (1, 1) if layer.order == "before" else layer.stride


def _dense_padding(layer: GaussianEnvelopeConv2d, margins: Sequence[int]) -> str | tuple[int, ...]:
    """The padding with which a kernel that is larger by these margins computes the same positions."""
    if not isinstance(layer.padding, str):
        return tuple(p + m for p, m in zip(layer.padding, margins, strict=True))
    reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    if max(reach) == 1:  # "same" pads a single pixel by none
        return tuple(margins)
    if any(r < s for r, s in zip(reach, layer.stride, strict=True)):
        raise ValueError(
            f"padding='same' with kernel_size={layer.kernel_size} and stride={layer.stride}: no padding puts a dense"
            " kernel where the small one was; to_conv() and tcc.merge(model) without dense=True keep the layer exact"
        )
    return "same"


def _is_plain(layer: GaussianEnvelopeConv2d) -> bool:
    sigma = layer.geometry["sigma"]
    return not sigma.is_meta and all_delta(sigma)


def _taps(layer: GaussianEnvelopeConv2d) -> Tensor:
    """(C, k_g): filters of all smoothed channels."""
    channels = layer.in_channels if layer.order == "before" else layer.out_channels
    taps = envelope_filter(layer.variance.detach(), layer.inference_size)
    return taps.to(layer.weight.dtype).expand(channels, -1)


def _taps_per_kernel(layer: GaussianEnvelopeConv2d) -> Tensor:
    """(C_out, C_in/groups, k_g): the filter that goes with each kernel of the weight."""
    rows, columns = layer.weight.shape[:2]
    if layer.order == "after":
        return _taps(layer).unsqueeze(1).expand(rows, columns, -1)
    by_group = _taps(layer).unflatten(0, (layer.groups, 1, columns))
    return by_group.expand(-1, rows // layer.groups, -1, -1).flatten(0, 1)


def _conv(
    layer: GaussianEnvelopeConv2d, weight: Tensor, bias: Tensor | None, stride: Sequence[int], **changes: Any
) -> nn.Conv2d:
    """An ordinary convolution with a copy of these weights and the layer's other settings."""
    settings: dict[str, Any] = {"padding": layer.padding, "dilation": layer.dilation, **changes}
    settings |= {"kernel_size": tuple(weight.shape[2:]), "stride": tuple(stride), "groups": layer.groups}
    settings |= {"bias": False, "device": "meta"}
    if settings["padding"] == "same" and max(stride) > 1:
        conv: nn.Conv2d = Conv2dSame(layer.in_channels, layer.out_channels, **{**settings, "padding": 0})
    else:
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, padding_mode=layer.padding_mode, **settings)
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    conv.bias = _copied(bias)
    return conv.train(layer.training)


def _pass(layer: GaussianEnvelopeConv2d, axis: int, stride: int) -> nn.Conv2d:
    """The smoothing along one axis as a depthwise convolution."""
    taps, size = _taps(layer), layer.inference_size
    shape, strides, padding = ((v, o) if axis == 0 else (o, v) for v, o in ((size, 1), (stride, 1), (size // 2, 0)))
    conv = nn.Conv2d(
        len(taps), len(taps), shape, strides, padding, groups=len(taps), bias=False,
        padding_mode=layer.padding_mode, device="meta",
    )  # fmt: skip
    kernel = taps.reshape(-1, 1, *shape).clone()
    conv.weight = nn.Parameter(kernel, requires_grad=layer.geometry["sigma"].requires_grad)
    return conv


def _copied(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
