"""transformers' Trainer: constraints after every optimiser step, the penalty, and parameter groups."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..train import param_groups, training_hooks

__all__ = ["ContinuousConvCallback", "optimizer_cls_and_kwargs"]


class ContinuousConvCallback(TrainerCallback):
    """`tcc.training_hooks` while `Trainer.train` runs; the penalty is as there. The logged loss is without it."""

    def __init__(self, penalty_factor: float = 0.0, penalty_power: int = 1) -> None:
        self.settings: dict[str, Any] = {"penalty_factor": penalty_factor, "penalty_power": penalty_power}
        self._hooks = ExitStack()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._hooks.close()  # a training that an error ended has no on_train_end
        self._hooks.enter_context(training_hooks(**self.settings))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._hooks.close()


def optimizer_cls_and_kwargs(model: nn.Module, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """For Trainer's argument of that name: the optimiser of `args`, with the groups of `tcc.param_groups`."""
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    groups = param_groups(model, args.learning_rate, args.weight_decay, apply_lr_scale=True)
    return optimizer, {**settings, "params": groups}
