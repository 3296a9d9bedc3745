"""What accuracy does not show: shifts, other resolutions, noise, blur."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .resolution import at_size

__all__ = ["BLURS", "NOISES", "RESOLUTIONS", "SHIFTS", "robustness", "top1"]

SHIFTS = (1, 2, 3)
RESOLUTIONS = (0.5, 0.75, 1.5, 2.0)
NOISES = (0.2, 0.4)
BLURS = (0.75, 1.5)
BATCH = 100  # larger ones leave the caches


@torch.no_grad()
def robustness(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares from 0 to 1, in eval mode.

    Args:
        model: (N, 1, H, W) pictures to logits.
        images, labels: normalised test pictures.

    Returns:
        shift N: share of pictures whose top-1 is the same after a shift by N pixels (the mean of four directions);
        size, noise and blur: accuracy on pictures resized, with noise of so many standard deviations, and blurred by a
        Gaussian of so many pixels;
        scaled size: accuracy on the same resized pictures of a network that was told of the size; only of networks that
        can be told, see `at_size`.
    """
    model.eval()
    plain = top1(model, images)
    results = {}
    for shift in SHIFTS:
        moved = [_shifted(images, dy, dx) for dy, dx in ((shift, 0), (-shift, 0), (0, shift), (0, -shift))]
        kept = [(top1(model, other) == plain).float().mean().item() for other in moved]
        results[f"shift {shift}"] = sum(kept) / len(kept)
    changed = {f"size {ratio}": _resized(images, ratio) for ratio in RESOLUTIONS}
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    changed |= {f"noise {amount}": images + amount * noise for amount in NOISES}
    changed |= {f"blur {sigma}": _blurred(images, sigma) for sigma in BLURS}
    for name, pictures in changed.items():
        results[name] = _accuracy(model, pictures, labels)
    for ratio in RESOLUTIONS:
        pictures = changed[f"size {ratio}"]
        if (scaled := at_size(model, images.shape[-1], pictures.shape[-1])) is not None:
            results[f"scaled size {ratio}"] = _accuracy(scaled, pictures, labels)
    return results


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (top1(model, images) == labels).float().mean().item()


def top1(model: nn.Module, images: Tensor) -> Tensor:
    """The class of each picture that the model finds the likeliest."""
    return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


def _shifted(images: Tensor, dy: int, dx: int) -> Tensor:
    """Pictures moved by whole pixels; what comes in is background."""
    reach = max(SHIFTS)
    padded = F.pad(images, (reach,) * 4, value=images.min().item())
    height, width = images.shape[-2:]
    return padded[..., reach - dy : reach - dy + height, reach - dx : reach - dx + width]


def _resized(images: Tensor, ratio: float) -> Tensor:
    size = [round(ratio * side) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).view(1, 1, -1, 1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps), taps.mT)
