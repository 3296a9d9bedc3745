"""Digits trained under bfloat16 autocast and in float32: test accuracies, paired by seed.

    python -m benchmarks.papers.bfloat16_digits [--model NAME] [--epochs 10] [--seeds 5] [--output FILE]

Prints both accuracies (450 of 1,797 images) for every seed, their means and spread, and the mean difference.
"""

from __future__ import annotations

import statistics

import timm
import torch

import timm_contconv  # noqa: F401  (registers the models)
from benchmarks.common import arguments, new_parser, summary, write_results
from timm_contconv.cli.digits import Digits, load_digits, train_on_digits

MODEL = "test_convnext_dcls_gauss"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def accuracy(digits: Digits, seed: int, dtype: torch.dtype | None, epochs: int, name: str) -> float:
    """Test accuracy, 0 to 1, after training under autocast to `dtype`, or without where it is None."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10)
    if dtype is not None:
        model.forward = torch.autocast("cpu", dtype)(model.forward)
    return train_on_digits(model, digits, epochs, seed=seed).accuracy


def main() -> None:
    parser = new_parser(__doc__, "bfloat16_digits.json")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    options = arguments(parser)
    digits = load_digits()
    found: dict[str, list[float]] = {name: [] for name in DTYPES}
    for seed in range(options.seeds):
        for name, dtype in DTYPES.items():
            found[name].append(100 * accuracy(digits, seed, dtype, options.epochs, options.model))
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f} %" for name, values in found.items()), flush=True)
    for name, values in found.items():
        print(f"{name}: {summary(values)} % over {len(values)} seeds")
    paired = [b - a for a, b in zip(*found.values(), strict=True)]
    error = statistics.stdev(paired) / len(paired) ** 0.5
    print(f"bfloat16 - float32: {statistics.mean(paired):+.2f} ± {error:.2f} points (mean and its standard error)")
    record = {"model": options.model, "epochs": options.epochs, "accuracy in percent": found}
    write_results(options.output, record)


if __name__ == "__main__":
    main()
