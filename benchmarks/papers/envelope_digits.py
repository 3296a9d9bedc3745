"""Digits, with and without the Gaussian envelope: accuracy over seeds, and what sigma becomes.

    python -m benchmarks.papers.envelope_digits [--epochs 20] [--seeds 5] [--figure docs/images/envelope_digits.png]

Every number in docs/papers/envelope.md about all of the digits is printed by this script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import timm_contconv  # noqa: F401  (registers the models)
from benchmarks.common import arguments, new_parser, summary
from timm_contconv.cli.digits import Digits, accuracy, load_digits, train_on_digits
from timm_contconv.inspect import figures
from timm_contconv.layers.envelope import shrink_envelopes, sigma_per_layer

MODELS = ("test_resnet", "test_resnet_genv")
FIXED_SIGMAS = (0.5, 0.6, 0.7)


def train(name: str, digits: Digits, epochs: int, seed: int, **kwargs: Any) -> tuple[nn.Module, float]:
    """One model trained from scratch, and its test error in percent."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, **kwargs)
    result = train_on_digits(model, digits, epochs, seed=seed)
    return model.eval(), 100 * (1 - result.accuracy)


@torch.no_grad()
def print_shrinking(model: nn.Module, digits: Digits, sigma: str) -> None:
    """What k_g = 3 instead of 9 does to the logits of the trained model, in their standard deviations."""
    full = model(digits.test_images)
    change = (shrink_envelopes(model, 3)(digits.test_images) - full) / full.std()
    after = accuracy(model, digits)
    shrink_envelopes(model, 9)
    before = accuracy(model, digits)
    print(
        f"sigma {sigma}, k_g 9 -> 3: logits change by {change.square().mean().sqrt():.3f} standard deviations (rms),"
        f" {change.abs().max():.3f} at most; test error {100 - 100 * before:.2f} -> {100 - 100 * after:.2f} %",
        flush=True,
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figure", type=Path)
    options = arguments(parser)
    digits = load_digits()
    errors: dict[str, list[float]] = {name: [] for name in MODELS}
    for seed in range(options.seeds):
        for name in MODELS:
            model, error = train(name, digits, options.epochs, seed)
            errors[name].append(error)
            print(f"seed {seed}  {name:18s} test error {error:.2f} %", flush=True)
    for name, values in errors.items():
        print(f"{name:18s} {summary(values)} % over {len(values)} seeds")
    for name, sigma in sigma_per_layer(model).items():
        print(f"{name:18s} sigma {sigma['mean']:.2f}, from {sigma['min']:.2f} to {sigma['max']:.2f} pixels")
    if options.figure is not None:
        figures.geometry(model, "σ of envelopes").save(options.figure)
    print_shrinking(model, digits, "learned")
    for sigma in FIXED_SIGMAS:
        fixed = {"initial_sigma": sigma, "learn_sigma": False}
        model, _ = train("test_resnet_genv", digits, options.epochs, 0, patch_args=fixed)
        print_shrinking(model, digits, str(sigma))


if __name__ == "__main__":
    main()
