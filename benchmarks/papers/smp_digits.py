"""SmpTCN reads scikit-learn's digits one pixel at a time: 64 steps, in the images' order and in a random one.

    python -m benchmarks.papers.smp_digits [--epochs N] [--threads N] [--output FILE]

Prints test accuracies (360 of 1,797 images) and seconds. Fails under 95 % in order and 85 % permuted.
"""

from __future__ import annotations

import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks.common import arguments, new_parser, require, write_results
from timm_contconv.models.smp_tcn import SmpTCN

TRAINING_IMAGES = 1437
BATCH = 64
LEARNING_RATE = 1e-2
LEAST = {"in order": 0.95, "permuted": 0.85}


def accuracy(order: Tensor, epochs: int) -> float:
    """Test accuracy after training on the pixels in the given order; the split follows the random seed."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)[:, None, order] / 8 - 1
    y = torch.tensor(labels)
    train, test = torch.randperm(len(y)).split([TRAINING_IMAGES, len(y) - TRAINING_IMAGES])
    model = SmpTCN(1, 10, length=64, channels=32, initial_radius=0.1)
    optimizer = torch.optim.AdamW(tcc.param_groups(model, lr=LEARNING_RATE, weight_decay=0.01))
    steps = TRAINING_IMAGES // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * steps)
    for _ in range(epochs):
        for index in train[torch.randperm(len(train))].split(BATCH)[:steps]:
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tcc.constrain_(model)
    with torch.no_grad():
        return (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()


def main() -> None:
    parser = new_parser(__doc__, "smp_digits.json")
    parser.add_argument("--epochs", type=int, default=8)
    options = arguments(parser)
    results = {}
    for name, order in (("in order", torch.arange(64)), ("permuted", torch.randperm(64))):
        start = time.perf_counter()
        result = accuracy(order, options.epochs)
        seconds = time.perf_counter() - start
        results[name] = {"accuracy": result, "seconds": seconds}
        print(f"{name}: {100 * result:.1f} % of the test images, {seconds:.0f} s", flush=True)
    write_results(options.output, {"epochs": options.epochs, "results": results})
    for name, least in LEAST.items():
        require(results[name]["accuracy"] >= least, f"{name}: at least {least:.0%} of the test images")


if __name__ == "__main__":
    main()
