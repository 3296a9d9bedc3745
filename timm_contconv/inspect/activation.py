"""Class activation maps (Grad-CAM, Selvaraju et al. 2017) by captum, which may be missing."""

from __future__ import annotations

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F

from .receptive_field import last_feature_map

__all__ = ["class_activations"]


def class_activations(model: nn.Module, images: Tensor) -> list[tuple[Tensor, int]]:
    """Grad-CAM of the last feature map, for the class with the highest logit.

    Args:
        model: a classifier in eval mode.
        images: (N, C, H, W), normalised as the model takes them.

    Returns:
        For each image, where the model sees its class, (H, W) from 0 to 1, and the number of that class.
    """
    with torch.no_grad():
        found = model(images).argmax(1)
    gradcam = LayerGradCam(model, last_feature_map(model, images[:1]))
    with torch.enable_grad():
        heat = gradcam.attribute(images.clone().requires_grad_(), target=found, relu_attributions=True)
    heat = F.interpolate(heat.detach().float(), images.shape[2:], mode="bilinear").squeeze(1)
    heat = heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return [(h.cpu(), int(label)) for h, label in zip(heat, found, strict=True)]
