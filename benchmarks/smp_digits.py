"""SmpTCN reads scikit-learn's digits one pixel at a time: 64 steps, in the images' order and in a random one.

    python -m benchmarks.smp_digits [--epochs N] [--threads N] [--output FILE]

Prints test accuracies (360 of 1,797 images) and seconds.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.models.smp_tcn import SmpTCN

TRAINING_IMAGES = 1437
BATCH = 64
LEARNING_RATE = 1e-2


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="more only help where nothing else runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/smp_digits.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = {}
    for name, order in (("in order", torch.arange(64)), ("permuted", torch.randperm(64))):
        start = time.perf_counter()
        result = accuracy(order, arguments.epochs)
        seconds = time.perf_counter() - start
        results[name] = {"accuracy": result, "seconds": seconds}
        print(f"{name}: {100 * result:.1f} % of the test images, {seconds:.0f} s", flush=True)
    record = {"epochs": arguments.epochs, "threads": arguments.threads, "results": results}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
