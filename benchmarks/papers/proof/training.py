"""Train one arm with one seed. Every arm sees the same pictures in the same order, with the same augmentation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks.common import multiply_adds
from timm_contconv.layers import ConvReplacement

from .arms import ARMS, Arm
from .data import TRAINING_PICTURES, Fashion
from .geometry import described_change, quantities, receptive_field
from .robustness import robustness, top1

__all__ = ["Schedule", "train_arm"]

BATCH = 32
WEIGHT_DECAY = 0.05
WARMUP = 0.1
EVALUATIONS = 10
ROBUSTNESS_PICTURES = 1000
RECEPTIVE_FIELD_PICTURES = 50


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all arms share.

    Attributes:
        pictures: of the training set, the first so many.
        epochs: of the plain network.
        tuning_epochs: where a trained network is fine-tuned.
        lr: largest learning rate, chosen for the plain network on the held-out pictures; `LEARNING_RATES` has them.

    Raises:
        ValueError: one is out of range.
    """

    pictures: int = 54_000
    epochs: int = 2
    tuning_epochs: int = 1
    lr: float = 4e-3

    def __post_init__(self) -> None:
        if not BATCH <= self.pictures <= TRAINING_PICTURES:
            raise ValueError(f"pictures={self.pictures}: expected {BATCH}, a batch, to {TRAINING_PICTURES}")
        if min(self.epochs, self.tuning_epochs) < 1 or self.lr <= 0:
            raise ValueError(f"{self}: expected one epoch or more, and a learning rate above 0")


#: by family; the better of two for the plain ConvNeXt and ResNet on held-out pictures (results/proof_tuning.jsonl), and
#: a usual one for the others
LEARNING_RATES = {"convnext": 0.004, "resnet": 0.008, "ccnet": 4e-3, "flexnet": 4e-3, "smpnet": 4e-3}


def train_arm(
    arm: Arm, seed: int, fashion: Fashion, schedule: Schedule, checkpoints: Path, advance: Callable[[float], object]
) -> dict[str, Any]:
    """Train, and say what came out.

    Args:
        arm: the contender.
        seed: of the initial values, the order and the augmentation.
        fashion: the data.
        schedule: what all arms share.
        checkpoints: folder where trained plain networks are kept for the arms that start from them.
        advance: called after every step with its part of the whole run, for a progress bar.

    Returns:
        What is recorded: parameters, epochs, seconds of the processor per step, accuracies, robustness, receptive
        field, geometry.
    """
    torch.manual_seed(seed)
    model = arm.build()
    epochs, lr = round(schedule.epochs * arm.longer), schedule.lr
    if arm.after is not None:
        _load_trained(model, arm, seed, schedule, checkpoints)
        epochs, lr = schedule.tuning_epochs, schedule.lr / 4
        if arm.after != "plain":
            tcc.patch(model, arm.after, **arm.settings)
    for layer in _layers(model):
        for name in arm.frozen:
            layer.geometry[name].requires_grad_(False)
    before = quantities(model)
    model.to(memory_format=torch.channels_last)
    if arm.family == "convnext" and not _layers(model):
        tcc.patch(model, "engine")  # exact; the gradients of PyTorch's own large depthwise convolutions are slow
    record = _train(model, seed, fashion, schedule.pictures, epochs, lr, advance)
    if arm.name == arm.family:
        torch.save(model.state_dict(), _checkpoint(arm.family, seed, schedule, checkpoints))
    few = slice(0, ROBUSTNESS_PICTURES)
    return {
        "multiply_adds": multiply_adds(model, fashion.test[:1]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": epochs,
        **record,
        "robustness": robustness(model, fashion.test[few], fashion.test_labels[few]),
        "receptive_field": receptive_field(model, fashion.test[:RECEPTIVE_FIELD_PICTURES]),
        "geometry": described_change(before, quantities(model)),
    }


def _train(
    model: nn.Module,
    seed: int,
    fashion: Fashion,
    pictures: int,
    epochs: int,
    lr: float,
    advance: Callable[[float], object],
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = fashion.train[:pictures], fashion.train_labels[:pictures]
    batches = len(labels) // BATCH
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr, WEIGHT_DECAY), fused=True)
    test, step, seconds = {}, 0, 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        start = time.thread_time()
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH)[:batches]:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"] * _warmup_cosine(step / (epochs * batches))
            loss = F.cross_entropy(model(_mirrored(images[batch], generator)), labels[batch], label_smoothing=0.1)
            loss = loss + 0.1 * tcc.penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tcc.constrain_(model)
            step += 1
            advance(1 / (epochs * batches))
        seconds += time.thread_time() - start
        if epoch % math.ceil(epochs / EVALUATIONS) == 0 or epoch == epochs:
            test[epoch] = _accuracy(model, fashion.test, fashion.test_labels)
    held_out = _accuracy(model, fashion.held_out, fashion.held_out_labels)
    return {
        "seconds_per_step": seconds / step,
        "test": list(test.values()),
        "tested_after": list(test),
        "held_out": held_out,
    }


def _warmup_cosine(progress: float) -> float:
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def _mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures mirrored."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return int((top1(model, images) == labels).sum()) / len(labels)


def _layers(model: nn.Module) -> list[ConvReplacement]:
    return [module for module in model.modules() if isinstance(module, ConvReplacement)]


def _checkpoint(family: str, seed: int, schedule: Schedule, folder: Path) -> Path:
    return folder / f"{family}-{seed}-{schedule.pictures}-{schedule.epochs}-{schedule.lr}.pt"


def _load_trained(model: nn.Module, arm: Arm, seed: int, schedule: Schedule, folder: Path) -> None:
    path = _checkpoint(arm.family, seed, schedule, folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"{arm.name}: starts from {ARMS[arm.family].name!r} of seed {seed}, and {path} is missing; run that one"
            " first (if it is recorded, take its line out of the results)"
        )
    model.load_state_dict(torch.load(path, weights_only=True))
