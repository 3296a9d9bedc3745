"""Sequence networks read scikit-learn's digits one pixel at a time: 64 steps, in the images' order and in a random one.

    python -m benchmarks.papers.sequence_digits [MODEL ...] [--seeds N] [--epochs N] [--threads N] [--output FILE]

The tasks of Romero et al. 2022 (Table 1) and Kim and Park 2023 (Table 2), on smaller images: SmpTCN, FlexTCN, CKTCN (no
masks) and a plain TCN of dilated convolutions (Bai et al. 2018), all of two blocks but the plain one, which needs four
to see 64 steps, and of nearly one size. Without a name all four run. Prints test accuracies (360 of 1,797 images), mean
and standard deviation over seeds. The order of the pixels differs by seed.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks.common import arguments, new_parser, read_results, summary, write_results
from timm_contconv.models.flex_tcn import FlexTCN
from timm_contconv.models.smp_tcn import SmpTCN
from timm_contconv.models.tcn import TCN

TRAINING_IMAGES, BATCH, LENGTH = 1437, 64, 64
LEARNING_RATE = 1e-2
PLAIN_TAPS = 5


def plain_tcn(channels: int, blocks: int = 4) -> TCN:
    """Causal convolutions of five taps; the dilation doubles from block to block."""
    count = itertools.count()

    def conv(in_chs: int, out_chs: int) -> nn.Module:
        dilation = 2 ** (next(count) // 2)
        pad = nn.ConstantPad1d(((PLAIN_TAPS - 1) * dilation, 0), 0.0)
        return nn.Sequential(pad, nn.Conv1d(in_chs, out_chs, PLAIN_TAPS, dilation=dilation))

    return TCN(1, 10, conv, nn.BatchNorm1d, channels, blocks, dropout=0.1)


MODELS = {
    "SmpTCN": functools.partial(SmpTCN, 1, 10, LENGTH, channels=16, blocks=2, initial_radius=0.1),
    "FlexTCN": functools.partial(FlexTCN, 1, 10, LENGTH, channels=14, blocks=2, flex_args={"initial_sigma": 0.5}),
    "CKTCN": functools.partial(FlexTCN, 1, 10, LENGTH, channels=14, blocks=2, flex_args={"mask": False}),
    "plain TCN": functools.partial(plain_tcn, 30),
}


def accuracy(name: str, order: Tensor, epochs: int, seed: int) -> tuple[float, int]:
    """Test accuracy in percent after training on the pixels in the given order, and the number of parameters."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)[:, None, order] / 8 - 1
    y = torch.tensor(labels)
    train, test = torch.randperm(len(y)).split([TRAINING_IMAGES, len(y) - TRAINING_IMAGES])
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr=LEARNING_RATE, weight_decay=0.01))
    rates = [group["lr"] * group.pop("lr_scale") for group in optimizer.param_groups]
    steps = TRAINING_IMAGES // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs * steps)
    for _ in range(epochs):
        for index in train[torch.randperm(len(train))].split(BATCH)[:steps]:
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tcc.constrain_(model)
    with torch.no_grad():
        percent = 100 * (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()
    return percent, sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = new_parser(__doc__, "sequence_digits.json")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    options = arguments(parser)
    if unknown := set(options.models) - MODELS.keys():
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    results = read_results(options.output).get("results", {})
    for name in options.models or MODELS:
        found: dict[str, Any] = {"parameters": 0, "in order": [], "permuted": []}
        start = time.perf_counter()
        for seed in track(range(options.seeds), description=name, transient=True):
            permuted = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(seed))
            for kind, order in (("in order", torch.arange(LENGTH)), ("permuted", permuted)):
                percent, found["parameters"] = accuracy(name, order, options.epochs, seed)
                found[kind].append(percent)
        found["seconds"] = time.perf_counter() - start
        print(
            f"{name} ({found['parameters']} parameters): in order {summary(found['in order'], 1)} %, permuted"
            f" {summary(found['permuted'], 1)} %; {found['seconds'] / 2 / options.seeds:.0f} s a training",
            flush=True,
        )
        results[name] = found
        write_results(options.output, {"seeds": options.seeds, "epochs": options.epochs, "results": results})


if __name__ == "__main__":
    main()
