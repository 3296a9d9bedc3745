"""What tests of several methods share: a layer of every kind, and how values are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timm_contconv.layers import (
    ContinuousConv2d,
    ConvReplacement,
    DclsConv1d,
    DclsConv2d,
    DclsConv3d,
    FlexConv1d,
    FlexConv2d,
    GaussianEnvelopeConv2d,
    SmpConv1d,
    SmpConv2d,
    SmpConvBn1d,
    SmpConvBn2d,
)

__all__ = [
    "KERNEL_LAYERS",
    "LAYERS",
    "every_kernel_layer",
    "every_layer",
    "image_for",
    "relative",
    "slow_but",
    "spread_",
]

_2D = {"kernel_size": 7, "padding": 3, "groups": 8}


def _smp_bn(**options) -> SmpConvBn2d:
    return SmpConvBn2d(SmpConv2d(8, 8, **_2D, bias=False, kernel_count=9, **options), 3)


def _smp_bn_causal(**options) -> SmpConvBn1d:
    return SmpConvBn1d(SmpConv1d(8, 8, 9, groups=2, bias=False, kernel_count=5, **options), 4, small_bias=True)


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test, all slow but some; a case of several parameters is a tuple."""
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


#: layers with a constructed kernel, 8 channels in and out; each factory takes device, dtype and other arguments
KERNEL_LAYERS: dict[str, Callable[..., ConvReplacement]] = {
    "dcls": functools.partial(DclsConv2d, 8, 8, **_2D, kernel_count=5),
    "dcls_bilinear": functools.partial(DclsConv2d, 8, 8, **_2D, kernel_count=5, interpolation="bilinear"),
    "dcls_triangle": functools.partial(DclsConv2d, 8, 8, **_2D, kernel_count=5, interpolation="triangle"),
    "dcls_rows": functools.partial(DclsConv2d, 8, 4, (6, 5), 2, "same", groups=4, kernel_count=2, position_dims=(1,)),
    "dcls_reflect": functools.partial(DclsConv2d, 8, 6, 7, padding=3, padding_mode="reflect", groups=2, kernel_count=3),
    "dcls_1d": functools.partial(DclsConv1d, 8, 8, **_2D, kernel_count=5),
    "dcls_3d": functools.partial(DclsConv3d, 8, 8, 3, padding=1, groups=8, kernel_count=5),
    "smp": functools.partial(SmpConv2d, 8, 8, **_2D, kernel_count=9),
    "smp_layer": functools.partial(SmpConv2d, 8, 8, **_2D, kernel_count=9, points="layer"),
    "smp_sum": functools.partial(SmpConv2d, 8, 8, **_2D, kernel_count=9, normalize=False, small_kernel=3, bias=False),
    "smp_dense": functools.partial(SmpConv2d, 8, 8, (5, 9), padding="same", groups=2, kernel_count=9),
    "smp_causal": functools.partial(SmpConv1d, 8, 8, 9, groups=8, kernel_count=5, small_kernel=4),
    "flex": functools.partial(FlexConv2d, 8, 8, 9, groups=8, hidden_channels=6),
    "flex_whole": functools.partial(FlexConv2d, 8, 8, **_2D, hidden_channels=6, mask=False, kernel_net="siren"),
    "flex_turned": functools.partial(
        FlexConv2d, 8, 8, 9, groups=8, hidden_channels=6, steerable=True, kernel_net="gabor"
    ),
    "flex_causal": functools.partial(FlexConv1d, 8, 8, 9, groups=2, hidden_channels=6, kernel_net="fourier"),
}
#: every kind of layer
LAYERS: dict[str, Callable[..., ConvReplacement]] = {
    **KERNEL_LAYERS,
    "smp_bn": _smp_bn,
    "smp_bn_causal": _smp_bn_causal,
    "genv": functools.partial(GaussianEnvelopeConv2d, 8, 8, 3, 2, 1, groups=2, envelope_size=5),
    "genv_after": functools.partial(GaussianEnvelopeConv2d, 8, 8, 1, 2, envelope_size=5, order="after"),
    "cc": functools.partial(ContinuousConv2d, 8, 8, 3, 2, groups=2),
}

every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
every_kernel_layer = pytest.mark.parametrize("make", KERNEL_LAYERS.values(), ids=KERNEL_LAYERS.keys())


@torch.no_grad()
def spread_(layer: ConvReplacement) -> ConvReplacement:
    """Move the geometry all over the kernel, so that every part of it counts."""
    for name, value in layer.geometry.items():
        if name == "position":
            value.normal_(0, max(layer.kernel_size) / 5)
        elif name == "sigma":
            value.normal_()
        elif name == "coordinate":
            value.uniform_(-1.2, 1.2)
        elif name == "radius":
            value.uniform_(0.2, 1)
        elif name == "mask_sigma":
            value.uniform_(0.3, 0.5)
        elif name == "mask_angle":
            value.uniform_(-1, 1)
        elif name == "raw_sigma":
            value.normal_()
        elif layer.method == "cc":  # off the kinks of its initial kernel
            value.add_(torch.randn_like(value), alpha=0.05)
    layer.constrain_()
    return layer


def image_for(layer: nn.Module, batch: int = 2) -> Tensor:
    """An input of the layer's dtype, of other sizes along each dimension."""
    size = (12, 11, 10)[: len(layer.kernel_size)]
    if layer.method == "cc":  # at odd sizes it takes other positions than the convolution that it is merged to
        size = (12, 10)
    return torch.randn(batch, layer.in_channels, *size, dtype=next(layer.parameters()).dtype)


def relative(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected||."""
    return (torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected)).item()
