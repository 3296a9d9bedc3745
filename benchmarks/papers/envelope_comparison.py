"""The envelope against what else could smooth (Kobayashi 2023, Table 1g and 1h), on few of scikit-learn's digits.

    python -m benchmarks.papers.envelope_comparison [--seeds N] [--epochs N] [--threads N] [--output FILE]

timm's test_resnet with 200 of the digits for training and 450 for testing: plain, with the envelope, with fixed widths,
with CBS (a fixed width after the convolution that decays by 0.9 in every second epoch), and with the layers of
`envelope_methods`. Prints test errors in percent, mean and standard deviation over seeds, and the difference from the
plain network, paired by seed.
"""

from __future__ import annotations

import contextlib
import time

import timm
import torch
from rich.progress import track
from torch import nn

import timm_contconv as tcc
from benchmarks.common import against, arguments, few_digits, new_parser, summary, write_results
from benchmarks.papers.envelope_methods import METHODS, replace_strided
from timm_contconv.cli.digits import Digits, train_on_digits
from timm_contconv.train import decaying_sigma

TRAINING_IMAGES, BATCH = 200, 50
FIXED = {"sigma 0.6": 0.6, "sigma 2": 2.0}
PLAIN, ENVELOPE, CBS = "plain", "envelope", "CBS"
KINDS = (PLAIN, ENVELOPE, *FIXED, CBS, *METHODS)


def network(kind: str, seed: int) -> nn.Module:
    """The base starts from the same weights for all kinds of one seed."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=10)
    if kind in METHODS:
        return replace_strided(model, METHODS[kind])
    if kind == ENVELOPE:
        return tcc.patch(model, "genv", initial_sigma=0.83)
    if kind in FIXED:
        return tcc.patch(model, "genv", initial_sigma=FIXED[kind], learn_sigma=False)
    return tcc.patch(model, "genv", order="after", learn_sigma=False, initial_sigma=1.0) if kind == CBS else model


def error(kind: str, digits: Digits, epochs: int, seed: int) -> float:
    """Test error in percent."""
    model = network(kind, seed)
    every = 2 * (TRAINING_IMAGES // BATCH)
    schedule = decaying_sigma(model, start=1.0, decay=0.9, every=every) if kind == CBS else contextlib.nullcontext()
    with schedule:
        return 100 * (1 - train_on_digits(model, digits, epochs, batch_size=BATCH, seed=seed).accuracy)


def main() -> None:
    parser = new_parser(__doc__, "envelope_comparison.json")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    options = arguments(parser)
    digits = few_digits(TRAINING_IMAGES)
    results, start = {}, time.perf_counter()
    for kind in KINDS:
        seeds = track(range(options.seeds), description=kind, transient=True)
        errors = [error(kind, digits, options.epochs, seed) for seed in seeds]
        plain = results.get(PLAIN, {"errors": errors})["errors"]
        gains, difference = against(errors, plain)
        results[kind] = {"errors": errors, "against_plain": gains}
        seconds = time.perf_counter() - start
        print(
            f"{kind}: test error {summary(errors)} %, {difference}; {seconds:.0f} s",
            flush=True,
        )
        write_results(options.output, {"seeds": options.seeds, "epochs": options.epochs, "results": results})


if __name__ == "__main__":
    main()
