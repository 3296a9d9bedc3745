"""Class activation maps (Grad-CAM, Selvaraju et al. 2017) by captum, which may be missing."""

from __future__ import annotations

import dataclasses

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F

from .receptive_field import last_feature_map

__all__ = ["Activation", "class_activations"]


@dataclasses.dataclass(frozen=True)
class Activation:
    """Where a model sees its class in one image.

    Attributes:
        heat: (H, W), from 0 to 1, in the size of the image.
        label: number of the class with the highest logit.
    """

    heat: Tensor
    label: int


def class_activations(model: nn.Module, images: Tensor) -> list[Activation]:
    """Grad-CAM of the last feature map, for the class with the highest logit.

    Args:
        model: a classifier in eval mode.
        images: (N, C, H, W), normalised as the model takes them.
    """
    with torch.no_grad():
        found = model(images).argmax(1)
    gradcam = LayerGradCam(model, last_feature_map(model, images[:1]))
    with torch.enable_grad():
        heat = gradcam.attribute(images.clone().requires_grad_(), target=found, relu_attributions=True)
    heat = F.interpolate(heat.detach().float(), images.shape[2:], mode="bilinear").squeeze(1)
    heat = heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return [Activation(h.cpu(), int(label)) for h, label in zip(heat, found, strict=True)]
