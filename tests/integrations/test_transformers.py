"""transformers' Trainer with the callback and the parameter groups."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ..models_for_tests import layers_of
from ..train.shared import dcls_model, geometry_ids

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Classifier(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trained(model, folder):
    from timm_contconv.integrations.transformers import ContinuousConvCallback, optimizer_cls_and_kwargs

    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i} for i in range(8)]
    module = Classifier(copy.deepcopy(model))
    args = transformers.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=0.1, weight_decay=0.05, optim="sgd",
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(
        module, args, train_dataset=data, callbacks=[ContinuousConvCallback(penalty_factor=1.0)],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(module, args),
    )  # fmt: skip
    trainer.train()
    return module, trainer.optimizer.param_groups


def test_geometry_is_penalised_stays_in_its_bounds_and_is_not_decayed(tmp_path):
    model = dcls_model()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.geometry["position"].fill_(1000.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "penalty_factor: had no effect|.*weight_decay acts on")
        module, groups = trained(model, tmp_path)
    assert all(layer.geometry["position"].abs().max() <= 8 for layer in layers_of(module))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert {rates[key] for key in geometry_ids(module)} == {(0.5, 0.0)}
    assert (0.1, 0.05) in rates.values()
