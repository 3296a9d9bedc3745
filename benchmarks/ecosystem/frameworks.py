"""Rows of training libraries: what makes the optimizer, the loop and the checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc

from .rows import Expected, check_geometry, classifier, close, images, woken

__all__ = ["ROWS"]


def timm_features(name: str) -> None:
    """features_only, create_optimizer_v2 with weight decay, AdamW, Muon"""
    model = woken(timm.create_model(name, features_only=True))
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    model(images())[-1].mean().backward()
    optimizer.step()
    tcc.constrain_(model)
    check_geometry(model, optimizer)
    whole = classifier(name)
    muon = timm.optim.Muon(tcc.param_groups(whole, 1e-3, 0.05))
    whole(images()).square().mean().backward()
    muon.step()
    tcc.constrain_(whole)
    check_geometry(whole, muon)


def timm_output_stride(name: str) -> None:
    """output_stride 8 and 16 with the classifier's weights"""
    model = classifier(name)
    for stride in (8, 16):
        dilated = timm.create_model(name, num_classes=10, output_stride=stride)
        if dilated.state_dict().keys() != model.state_dict().keys():
            raise Expected("strides became dilations: fewer layers are strided, so fewer are replaced")
        dilated.load_state_dict(model.state_dict())
        dilated(images())


def lightning_fit(name: str) -> None:
    """Trainer.fit with ContinuousConvCallback, accumulation, bf16-mixed"""
    import lightning.pytorch as pl

    from timm_contconv.integrations.lightning import ContinuousConvCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(name)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(tcc.param_groups(self, 1e-3, 0.05, apply_lr_scale=True))

    data = torch.utils.data.TensorDataset(images(8), torch.arange(8))
    module = Module()
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2, precision="bf16-mixed",
        callbacks=[ContinuousConvCallback(penalty_factor=0.1 if name.endswith(("gauss", "flex")) else 0.0)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    check_geometry(module, trainer.optimizers[0])


def transformers_trainer(name: str) -> None:
    """Trainer with ContinuousConvCallback and optimizer_cls_and_kwargs"""
    from transformers import Trainer, TrainingArguments

    from timm_contconv.integrations.transformers import ContinuousConvCallback, optimizer_cls_and_kwargs

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(name)

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    module = Module()
    data = [{"pixel_values": x, "labels": i} for i, x in enumerate(images(8))]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, weight_decay=0.05, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            module, args, train_dataset=data, callbacks=[ContinuousConvCallback()],
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(module, args),
        )  # fmt: skip
        trainer.train()
    check_geometry(module, trainer.optimizer)


def transformers_auto(name: str) -> None:
    """AutoModelForImageClassification of a saved folder"""
    from transformers import AutoModelForImageClassification

    model, x = classifier(name).eval(), images()
    with tempfile.TemporaryDirectory() as folder:
        tcc.save_pretrained(model, Path(folder) / "model")
        loaded = AutoModelForImageClassification.from_pretrained(Path(folder) / "model").eval()
    close(loaded(pixel_values=x).logits, model(x))


def accelerate_prepare(name: str) -> None:
    """prepare, accumulation, clipping"""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = classifier(name)
    optimizer = torch.optim.AdamW(tcc.param_groups(model, 1e-3, 0.05, apply_lr_scale=True))
    model, optimizer = accelerator.prepare(model, optimizer)
    with tcc.training_hooks():
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(images()).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    check_geometry(model, optimizer.optimizer)


def accelerate_offload(name: str) -> None:
    """cpu_offload with tcc.no_split_modules"""
    from accelerate import cpu_offload

    model, x = classifier(name).eval(), images()
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, torch.device("cpu"), preload_module_classes=tcc.no_split_modules(model))
        close(model(x), expected)


def peft_lora(name: str) -> None:
    """LoRA on convolutions, trained, merge_and_unload"""
    from peft import LoraConfig, get_peft_model

    model, x = classifier(name), images()
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.numel() > 64]
    targets = [n for n in targets if getattr(model.get_submodule(n), "groups", 1) == 1]
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        lora(x).square().mean().backward()
        optimizer.step()
        tcc.constrain_(lora)
    check_geometry(lora, optimizer)  # it is frozen, as all that LoRA does not add
    lora.eval()
    with torch.no_grad():
        expected = lora(x)
        close(lora.merge_and_unload()(x), expected)


def skorch_fit(name: str) -> None:
    """NeuralNetClassifier.fit within tcc.training_hooks"""
    from skorch import NeuralNetClassifier

    model = classifier(name)
    net = NeuralNetClassifier(
        model, criterion=nn.CrossEntropyLoss, max_epochs=1, batch_size=4, train_split=None, verbose=0,
        optimizer=lambda params, lr: torch.optim.AdamW(tcc.param_groups(model, 1e-3, 0.05, apply_lr_scale=True)),
    )  # fmt: skip
    with tcc.training_hooks():
        net.fit(images(8).numpy(), torch.arange(8).numpy())
    check_geometry(model, net.optimizer_)


def fastai_fit(name: str) -> None:
    """Learner.fit within tcc.training_hooks"""
    import fastai.callback.progress  # noqa: F401 - gives learners `no_bar`
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    model = classifier(name)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(8), torch.arange(8)), batch_size=4)
    groups = tcc.param_groups(model, 1e-3, 0.05, apply_lr_scale=True)
    learner = Learner(
        DataLoaders(data, data), model, nn.CrossEntropyLoss(),
        opt_func=lambda *_, **__: OptimWrapper(opt=torch.optim.AdamW(groups)),
    )  # fmt: skip
    with tcc.training_hooks(), learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=[group["lr"] for group in groups])
    check_geometry(model, learner.opt.opt)


ROWS = (
    ("timm", timm_features),
    ("timm", timm_output_stride),
    ("lightning", lightning_fit),
    ("transformers", transformers_trainer),
    ("transformers", transformers_auto),
    ("accelerate", accelerate_prepare),
    ("accelerate", accelerate_offload),
    ("peft", peft_lora),
    ("skorch", skorch_fit),
    ("fastai", fastai_fit),
)
