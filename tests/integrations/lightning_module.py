"""A training in Lightning. Lightning takes seconds to import, so tests import this file when they run."""

import copy
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_contconv as tcc

__all__ = ["Module", "fitted", "trainer"]


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, penalty: float = 0.0) -> None:
        super().__init__()
        self.model, self.penalty = model, penalty

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels) + self.penalty * tcc.penalty(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(tcc.param_groups(self.model, 0.1, 0.05, apply_lr_scale=True))


def trainer(callbacks: list[Any], **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        max_steps=1, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **quiet, **options
    )


def fitted(model: nn.Module, callbacks: list[Any], *, penalty: float = 0.0, **options: Any) -> Module:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8))
    module = Module(copy.deepcopy(model), penalty)
    trainer(callbacks, **options).fit(module, DataLoader(data, batch_size=4))
    return module
