"""Digits trained under bfloat16 autocast and in float32: test accuracies, paired by seed.

    python -m benchmarks.bfloat16_digits [--model NAME] [--epochs 10] [--seeds 5] [--output FILE]

Prints both accuracies (450 of 1,797 images) for every seed, their means and spread, and the mean difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import timm
import torch

import timm_contconv  # noqa: F401  (registers the models)
from timm_contconv.cli.digits import Digits, load_digits, train_on_digits

MODEL = "test_convnext_dcls_gauss"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def accuracy(digits: Digits, seed: int, dtype: torch.dtype | None, epochs: int, name: str = MODEL) -> float:
    """Test accuracy, 0 to 1, after training under autocast to `dtype`, or without where it is None."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10)
    if dtype is not None:
        model.forward = torch.autocast("cpu", dtype)(model.forward)
    return train_on_digits(model, digits, epochs, seed=seed).accuracy


def difference(digits: Digits, seed: int, epochs: int, name: str = MODEL) -> float:
    """Accuracy under bfloat16 less that in float32, from the same seed."""
    exact, rounded = (accuracy(digits, seed, dtype, epochs, name) for dtype in DTYPES.values())
    return rounded - exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bfloat16_digits.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the models are small: more threads would wait for one another
    digits = load_digits()
    found: dict[str, list[float]] = {name: [] for name in DTYPES}
    for seed in range(arguments.seeds):
        for name, dtype in DTYPES.items():
            found[name].append(100 * accuracy(digits, seed, dtype, arguments.epochs, arguments.model))
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f} %" for name, values in found.items()), flush=True)
    for name, values in found.items():
        print(f"{name}: {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} % over {len(values)} seeds")
    paired = [b - a for a, b in zip(*found.values(), strict=True)]
    error = statistics.stdev(paired) / len(paired) ** 0.5
    print(f"bfloat16 - float32: {statistics.mean(paired):+.2f} ± {error:.2f} points (mean and its standard error)")
    record = {"model": arguments.model, "epochs": arguments.epochs, "accuracy in percent": found}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
