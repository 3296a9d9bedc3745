"""scikit-learn's handwritten digits as images, and short training on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..train import constrain_, param_groups

__all__ = ["Digits", "TrainingResult", "accuracy", "load_digits", "train_on_digits"]


@dataclasses.dataclass(frozen=True)
class Digits:
    """1,797 real images of digits (scikit-learn), upsampled from 8 to 32 pixels, in a fixed stratified split.

    Attributes:
        train_images, test_images: (N, 3, 32, 32), grey as RGB, zero mean and unit variance over the training set.
        train_labels, test_labels: (N,), 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        accuracy: on the test split, 0 to 1.
        parameters: number of parameters.
    """

    accuracy: float
    parameters: int


def load_digits() -> Digits:
    """Load the digits; a quarter of them is the test split."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = F.interpolate(torch.from_numpy(data.images).float().unsqueeze(1), size=32, mode="bilinear")
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=data.target)
    mean, std = images[train].mean(), images[train].std()
    images = ((images - mean) / std).expand(-1, 3, -1, -1)
    return Digits(images[train], labels[train], images[test], labels[test])


def train_on_digits(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    *,
    lr: float = 4e-3,
    weight_decay: float = 0.05,
    batch_size: int = 64,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> TrainingResult:
    """Train with AdamW, one cosine cycle, and shifts by up to two pixels.

    Args:
        model: takes (N, 3, 32, 32), gives 10 logits.
        digits: the data.
        epochs: passes over the training split.
        lr: largest learning rate of the weights.
        weight_decay: weight decay of the weights.
        batch_size: images per step.
        seed: seed of the order and the shifts.
        advance: called after every step, for a progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(param_groups(model, lr, weight_decay))
    steps = epochs * (len(digits.train_labels) // batch_size)
    step = 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for batch in order.split(batch_size)[: len(order) // batch_size]:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"] * _warmup_cosine(step, steps)
            images = _shift(digits.train_images[batch], generator)
            loss = F.cross_entropy(model(images), digits.train_labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            constrain_(model)
            step += 1
            advance()
    return TrainingResult(accuracy(model, digits), sum(parameter.numel() for parameter in model.parameters()))


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Fraction of the test split that the model classifies correctly in eval mode."""
    training = model.training
    model.eval()
    correct = int((model(digits.test_images).argmax(1) == digits.test_labels).sum())
    model.train(training)
    return correct / len(digits.test_labels)


def _warmup_cosine(step: int, steps: int, warmup: float = 0.1) -> float:
    progress = (step + 1) / steps
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _shift(images: Tensor, generator: torch.Generator, reach: int = 2) -> Tensor:
    """Shift a batch by a random number of pixels; new pixels are background."""
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    background = float(images.min())
    padded = F.pad(images, (reach, reach, reach, reach), value=background)
    size = images.shape[-1]
    return padded[..., reach + dy : reach + dy + size, reach + dx : reach + dx + size]
