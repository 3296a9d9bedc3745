"""The authors' DCLS package, set up to do what one of our layers does."""

import torch
from DCLS.construct.modules import Dcls1d, Dcls2d, Dcls3_1d, Dcls3d
from torch import Tensor, nn

from timm_contconv.layers import DclsConv1d, DclsConv2d, DclsConv3d

__all__ = ["Dcls3_1d", "peer_kernel", "peer_of", "to_peer_axes"]

VERSIONS = {"bilinear": "v0", "normalized_bilinear": "v1", "triangle": "max", "gauss": "gauss"}
CLASSES = {1: Dcls1d, 2: Dcls2d, 3: Dcls3d}


def peer_of(layer: DclsConv1d | DclsConv2d | DclsConv3d) -> nn.Module:
    """The package's module with the layer's parameters."""
    peer = CLASSES[layer.ndim](
        layer.in_channels,
        layer.out_channels,
        kernel_count=layer.kernel.kernel_count,
        stride=layer.stride,
        padding=layer.padding,
        dilated_kernel_size=layer.kernel_size,
        groups=layer.groups,
        bias=layer.bias is not None,
        version=VERSIONS[layer.kernel.interpolation],
    )
    with torch.no_grad():
        peer.weight.copy_(layer.kernel.weight)
        peer.P.copy_(to_peer_axes(layer, layer.geometry["position"], shift=True))
        if "sigma" in layer.geometry:
            peer.SIG.copy_(to_peer_axes(layer, layer.geometry["sigma"], shift=False))
        if layer.bias is not None:
            peer.bias.copy_(layer.bias)
    return peer


def to_peer_axes(layer: nn.Module, value: Tensor, shift: bool) -> Tensor:
    """Reorder (D, ...) as the package has it: from the last dimension to the first, but for "bilinear".

    The package adds half of kernel_size[i] to index i, whichever dimension that index stands for: `shift` makes
    up for it where the kernel is not square.
    """
    axes = tuple(reversed(range(layer.ndim)))
    if layer.kernel.interpolation == "bilinear":
        axes = {1: (0,), 2: (0, 1), 3: (0, 2, 1)}[layer.ndim]
    size = layer.kernel_size
    rows = [value[d] + (size[d] // 2 - size[i] // 2 if shift else 0) for i, d in enumerate(axes)]
    return torch.stack(rows)


def peer_kernel(peer: nn.Module) -> Tensor:
    return peer.DCK(peer.weight, peer.P, peer.SIG)
