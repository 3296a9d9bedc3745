"""DCLS against plain kernels, and what its parts do, on few of scikit-learn's digits.

    python -m benchmarks.papers.dcls_digits [--seeds N] [--epochs N] [--threads N] [--output FILE]

A small ConvNeXt with 300 of the digits for training and 450 for testing: plain 7 x 7 kernels, and 17 x 17 DCLS kernels
with the three interpolations of Khalfaoui-Hassani et al. 2023 (Table 1), as many elements as keep the number of
parameters. Then, with Gauss, what is learned: neither positions nor widths, or one of the two. Prints test accuracies
in percent, mean and standard deviation over seeds, and the difference from the plain network, paired by seed.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.progress import track
from timm.models.convnext import ConvNeXt
from torch import nn

import timm_contconv as tcc
from benchmarks.common import against, arguments, few_digits, new_parser, summary, write_results
from timm_contconv.cli.digits import train_on_digits
from timm_contconv.layers import DclsConv2d

TRAINING_IMAGES, BATCH, KERNEL_SIZE = 300, 50, 17
PLAIN = "plain, 7 x 7"
#: recipe, and which of the geometry stays as it starts
KINDS: dict[str, tuple[str, tuple[str, ...]] | None] = {
    PLAIN: None,
    "bilinear": ("dcls", ()),
    "triangle": ("dcls_triangle", ()),
    "Gauss": ("dcls_gauss", ()),
    "Gauss, positions fixed": ("dcls_gauss", ("position",)),
    "Gauss, widths fixed": ("dcls_gauss", ("sigma",)),
    "Gauss, both fixed": ("dcls_gauss", ("position", "sigma")),
}


def network(kind: str, seed: int) -> nn.Module:
    """Four stages, on 16 x 16 to 2 x 2 positions; the base starts from the same weights for all kinds of one seed."""
    torch.manual_seed(seed)
    model = ConvNeXt(num_classes=10, patch_size=2, depths=(2, 2, 1, 1), dims=(16, 24, 32, 32), ls_init_value=1.0)
    if (settings := KINDS[kind]) is None:
        return model
    recipe, fixed = settings
    tcc.patch(model, recipe, kernel_size=KERNEL_SIZE, init="random")
    for layer in model.modules():
        if isinstance(layer, DclsConv2d):
            for name in fixed:
                layer.geometry[name].requires_grad_(False)
    return model


def main() -> None:
    parser = new_parser(__doc__, "dcls_digits.json")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=24)
    options = arguments(parser)
    digits = few_digits(TRAINING_IMAGES)
    results: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        start = time.perf_counter()
        runs = [
            train_on_digits(network(kind, seed), digits, options.epochs, batch_size=BATCH, seed=seed)
            for seed in track(range(options.seeds), description=kind, transient=True)
        ]
        accuracies = [100 * run.accuracy for run in runs]
        plain = results.get(PLAIN, {"accuracy": accuracies})["accuracy"]
        gains, difference = against(accuracies, plain)
        results[kind] = {"accuracy": accuracies, "against_plain": gains, "parameters": runs[0].parameters}
        print(
            f"{kind} ({runs[0].parameters} parameters): {summary(accuracies)} %, {difference};"
            f" {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        write_results(options.output, {"seeds": options.seeds, "epochs": options.epochs, "results": results})


if __name__ == "__main__":
    main()
