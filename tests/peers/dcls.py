"""The authors' DCLS package, set up to do what one of our layers does."""

import torch
from DCLS.construct.modules import Dcls1d, Dcls2d, Dcls3_1d, Dcls3d
from torch import Tensor, nn

from timm_contconv.layers.dcls import DclsConv1d, DclsConv2d, DclsConv3d

VERSIONS = {"bilinear": "v0", "triangle": "max", "gauss": "gauss"}
CLASSES = {1: Dcls1d, 2: Dcls2d, 3: Dcls3d}

# Spatial dimension (0 is the first of the kernel) that each index of the package's P and SIG stands for.
AXES = {
    ("bilinear", 1): (0,),
    ("bilinear", 2): (0, 1),
    ("bilinear", 3): (0, 2, 1),
    ("triangle", 1): (0,),
    ("triangle", 2): (1, 0),
    ("triangle", 3): (2, 1, 0),
    ("gauss", 1): (0,),
    ("gauss", 2): (1, 0),
    ("gauss", 3): (2, 1, 0),
}


def peer_of(layer: DclsConv1d | DclsConv2d | DclsConv3d) -> nn.Module:
    """The package's module with the layer's parameters."""
    peer = CLASSES[layer.ndim](
        layer.in_channels,
        layer.out_channels,
        kernel_count=layer.kernel_count,
        stride=layer.stride,
        padding=layer.padding,
        dilated_kernel_size=layer.kernel_size,
        groups=layer.groups,
        bias=layer.bias is not None,
        version=VERSIONS[layer.interpolation],
    )
    with torch.no_grad():
        peer.weight.copy_(layer.element_weight)
        peer.P.copy_(to_peer_axes(layer, layer.position, shift=True))
        if layer.sigma is not None:
            peer.SIG.copy_(to_peer_axes(layer, layer.sigma, shift=False))
        if layer.bias is not None:
            peer.bias.copy_(layer.bias)
    return peer


def to_peer_axes(layer: nn.Module, value: Tensor, shift: bool) -> Tensor:
    """Reorder (D, ...) as the package has it.

    The package adds half of kernel_size[i] to index i, whichever dimension that index stands for: `shift` makes
    up for it where the kernel is not square.
    """
    axes = AXES[layer.interpolation, layer.ndim]
    size = layer.kernel_size
    rows = [value[d] + (size[d] // 2 - size[i] // 2 if shift else 0) for i, d in enumerate(axes)]
    return torch.stack(rows)


def peer_kernel(peer: nn.Module) -> Tensor:
    return peer.DCK(peer.weight, peer.P, peer.SIG)


__all__ = ["Dcls3_1d", "peer_kernel", "peer_of", "to_peer_axes"]
