"""The effective receptive field of a model (Luo et al. 2016), measured as RepLKNet does (Ding et al. 2022)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SHARES", "ReceptiveField", "effective_receptive_field", "last_feature_map"]

#: shares of the contributions for which a report gives the smallest square
SHARES = (0.2, 0.5, 0.99)


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """How much every pixel of the input contributes to the centre of the last feature map.

    Attributes:
        contributions: (H, W), float64; they sum up to 1.
        images: number of images that it is the mean of.
    """

    contributions: Tensor
    images: int

    def square(self, share: float) -> int:
        """Side, in pixels, of the smallest centred square that holds this share of the contributions.

        Sides are odd, as in RepLKNet's released code; the whole image if no such square is enough.
        """
        height, width = self.contributions.shape
        for half in range(max(height, width) // 2 + 1):
            rows = slice(max(height // 2 - half, 0), height // 2 + half + 1)
            columns = slice(max(width // 2 - half, 0), width // 2 + half + 1)
            if self.contributions[rows, columns].sum() >= share:
                return min(2 * half + 1, max(height, width))
        return max(height, width)

    def area(self, share: float) -> float:
        """That square's part of the image, 0 to 1."""
        height, width = self.contributions.shape
        side = self.square(share)
        return min(side, height) * min(side, width) / (height * width)


def effective_receptive_field(
    model: nn.Module, images: Tensor, advance: Callable[[], Any] = lambda: None
) -> ReceptiveField:
    """The mean over images of the gradient of the centre of a model's last feature map.

    As in RepLKNet's released code, the positive values of all channels at the centre are summed up, and the positive
    parts of the gradient over the channels of the image.

    Args:
        model: in eval mode; its parameters need no gradients.
        images: (N, C, H, W), normalised as the model takes them.
        advance: called after each image.

    Raises:
        ValueError: the model has no feature map, or no pixel contributes to its centre.
    """
    layer = last_feature_map(model, images[:1])
    total = torch.zeros(images.shape[2:], dtype=torch.float64)
    for image in images:
        total += _contributions(model, layer, image[None]).double().cpu()
        advance()
    if not total.sum() > 0:
        raise ValueError("the centre of the last feature map depends on no pixel, or not by finite numbers")
    return ReceptiveField(total / total.sum(), len(images))


def last_feature_map(model: nn.Module, image: Tensor) -> nn.Module:
    """The module that computes the last output (N, C, H, W) of more than one pixel, as the last stage of a classifier.

    Raises:
        ValueError: there is none.
    """
    found: list[nn.Module] = []

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            found.append(module)

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(remember))
        model(image)
    if not found:
        raise ValueError(f"this {type(model).__name__} computes no feature map (N, C, H, W) of more than one pixel")
    return found[-1]


def _contributions(model: nn.Module, layer: nn.Module, image: Tensor) -> Tensor:
    """(H, W): the gradient of the centre for one image."""
    outputs: list[Tensor] = []
    keep = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with keep, torch.enable_grad():
        image = image.detach().clone().requires_grad_()
        model(image)
        features = outputs[-1]
        height, width = features.shape[2:]
        centre = features[:, :, height // 2, width // 2].relu().sum()
        (gradient,) = torch.autograd.grad(centre, image)
    return gradient.relu().sum((0, 1))
