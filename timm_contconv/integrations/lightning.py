"""Lightning: constraints after every optimiser step, and the penalty."""

from __future__ import annotations

from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer

from ..train import training_hooks

__all__ = ["ContinuousConvCallback"]


class ContinuousConvCallback(Callback):
    """`tcc.training_hooks` while `Trainer.fit` runs: any precision, accumulation and strategy that these allow.

    Args:
        penalty_factor, penalty_power: as for `tcc.training_hooks`. The logged loss is without the penalty.
    """

    def __init__(self, penalty_factor: float = 0.0, penalty_power: int = 1) -> None:
        self.penalty_factor = penalty_factor
        self.penalty_power = penalty_power
        self._hooks = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            hooks = training_hooks(penalty_factor=self.penalty_factor, penalty_power=self.penalty_power)
            self._hooks.enter_context(hooks)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hooks.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hooks.close()
