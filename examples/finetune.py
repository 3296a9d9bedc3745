"""Train or fine-tune a model with continuous convolutions, in one file to read and to copy.

    python examples/finetune.py                                        # scikit-learn's digits, from scratch
    python examples/finetune.py --resume                               # continue after an interruption
    python examples/finetune.py --data /path/to/folders --model resnet18 --pretrained --patch genv
    tensorboard --logdir finetune_output

--data is a folder with `train/` and `validation/`, each with one folder of images per class. Marks (1) to (3) show what
the methods need. The rest is an ordinary training loop with mixed precision, a moving average of the weights, and a
checkpoint after every epoch. On the same CPU, a resumed run gives bitwise the same weights as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import timm
import torch
from rich.progress import track
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import timm_contconv as tcc
from timm_contconv.cli.digits import load_digits
from timm_contconv.inspect import figures
from timm_contconv.layers import ConvReplacement

AMP_DTYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class Training:
    """Everything that changes during training. A checkpoint holds it."""

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint. An interruption does not damage the previous one."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer", "scaler")}
        unfinished = path.with_suffix(".unfinished")
        torch.save({**parts, "epoch": self.epoch}, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Load everything from a checkpoint."""
        if not path.is_file():
            raise FileNotFoundError(f"--resume: no checkpoint {path}; start without it")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self.epoch = checkpoint.pop("epoch")
        for name, state in checkpoint.items():
            getattr(self, name).load_state_dict(state)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; default: scikit-learn's digits")
    parser.add_argument("--model", default="test_convnext_dcls_gauss", help="any timm model")
    parser.add_argument("--pretrained", action="store_true", help="start from the model's released weights")
    parser.add_argument("--patch", metavar="RECIPE", help="replace convolutions; starts from their kernels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--layer-decay", type=float, help="learning rate of a layer relative to the next one's")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--penalty", type=float, default=0.0, help="factor on tcc.penalty(model) in the loss")
    parser.add_argument("--amp", choices=AMP_DTYPES, default="none", help="mixed precision")
    parser.add_argument("--ema-decay", type=float, default=0.99, help="decay of the moving average of the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("finetune_output"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    return parser.parse_args(arguments)


def load_batches(arguments: argparse.Namespace, model: nn.Module) -> tuple[DataLoader, DataLoader]:
    """Normalised training and test batches for `model`: the digits, or folders of images as timm reads them."""
    if arguments.data is None:
        digits = load_digits()
        train = TensorDataset(digits.train_images, digits.train_labels)
        test = TensorDataset(digits.test_images, digits.test_labels)
        size = arguments.batch_size
        return DataLoader(train, size, shuffle=True, drop_last=True), DataLoader(test, size)
    config = resolve_model_data_config(model)
    loaders = [
        create_loader(
            create_dataset("", root=arguments.data, split=split),
            batch_size=arguments.batch_size,
            is_training=split == "train",
            use_prefetcher=False,
            num_workers=arguments.workers,
            **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")},
        )
        for split in ("train", "validation")
    ]
    return loaders[0], loaders[1]


def count_classes(data: Path | None) -> int:
    return 10 if data is None else sum(folder.is_dir() for folder in (data / "train").iterdir())


def create_model(arguments: argparse.Namespace) -> nn.Module:
    classes = count_classes(arguments.data)
    model = timm.create_model(arguments.model, pretrained=arguments.pretrained, num_classes=classes)
    if arguments.patch:
        tcc.patch(model, arguments.patch)
    return model.to(arguments.device)


def start(arguments: argparse.Namespace) -> Training:
    random_seed(arguments.seed)
    model = create_model(arguments)
    # (1) Positions and widths have no weight decay, and the learning rate of their method's paper.
    groups = tcc.param_groups(model, arguments.lr, arguments.weight_decay, layer_decay=arguments.layer_decay)
    scaler = torch.amp.GradScaler(torch.device(arguments.device).type, enabled=arguments.amp == "float16")
    return Training(model, ModelEmaV3(model, decay=arguments.ema_decay), torch.optim.AdamW(groups), scaler)


def train_epoch(
    training: Training, batches: DataLoader, scheduler: CosineLRScheduler, arguments: argparse.Namespace
) -> float:
    """One pass over the data; returns the mean loss."""
    model, dtype = training.model.train(), AMP_DTYPES[arguments.amp]
    # Order and augmentation depend only on seed and epoch, so that a resumed run repeats them.
    random_seed(10_000 * arguments.seed + training.epoch)
    losses = []
    shown = track(batches, f"epoch {training.epoch + 1}", transient=True, disable=not sys.stdout.isatty())
    for index, (images, labels) in enumerate(shown):
        scheduler.step_update(training.epoch * len(batches) + index)
        images, labels = images.to(arguments.device), labels.to(arguments.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        if arguments.penalty:
            loss = loss + arguments.penalty * tcc.penalty(model)  # (2) the method's regulariser
        training.optimizer.zero_grad()
        training.scaler.scale(loss).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        tcc.constrain_(model)  # (3) the method's clamps
        training.ema.update(model)
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: str) -> float:
    model.eval()
    correct = [(model(images.to(device)).argmax(1) == labels.to(device)).cpu() for images, labels in batches]
    return torch.cat(correct).float().mean().item()


def log_geometry(writer: SummaryWriter, model: nn.Module, epoch: int) -> None:
    """Log positions and widths: histograms, spread, and the pictures of `tcc.inspect`."""
    layers = [module for module in model.modules() if isinstance(module, ConvReplacement)]
    geometry = {id(parameter) for layer in layers for parameter in layer.geometry.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in geometry:
            writer.add_histogram(f"geometry/{name}", parameter, epoch)
            writer.add_scalar(f"spread/{name}", parameter.std(correction=0), epoch)
    if layers:
        writer.add_image("kernels", figures.kernels(model).to_array(), epoch, dataformats="HWC")
        for name in figures.quantity_names(model):
            writer.add_image(name, figures.geometry(model, name).to_array(), epoch, dataformats="HWC")


def main(arguments: argparse.Namespace) -> Training:
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.output / "checkpoint.pt"
    training = start(arguments)
    if arguments.resume:
        training.load(checkpoint)
    train_batches, test_batches = load_batches(arguments, training.model)
    steps = arguments.epochs * len(train_batches)
    scheduler = CosineLRScheduler(
        training.optimizer, steps, warmup_t=steps // 10, warmup_lr_init=arguments.lr / 100, t_in_epochs=False
    )
    with SummaryWriter(arguments.output / "tensorboard", purge_step=training.epoch) as writer:
        while training.epoch < arguments.epochs:
            loss = train_epoch(training, train_batches, scheduler, arguments)
            models = {"model": training.model, "ema": training.ema.module}
            accuracies = {name: accuracy(model, test_batches, arguments.device) for name, model in models.items()}
            writer.add_scalar("loss", loss, training.epoch)
            writer.add_scalar("lr", training.optimizer.param_groups[0]["lr"], training.epoch)
            for name, value in accuracies.items():
                writer.add_scalar(f"accuracy/{name}", value, training.epoch)
            log_geometry(writer, training.model, training.epoch)
            training.epoch += 1
            training.save(checkpoint)
            shown = ", ".join(f"{name} {value:.2%}" for name, value in accuracies.items())
            print(f"epoch {training.epoch} of {arguments.epochs}: loss {loss:.3f}, test accuracy: {shown}", flush=True)
    saved = tcc.save_pretrained(training.ema.module, arguments.output / "model")
    print(f"timm.create_model('local-dir:{saved}', pretrained=True) loads the averaged weights")
    return training


if __name__ == "__main__":
    main(parse_arguments())
