"""The ablations of Kim and Park 2023, Tables 6 to 9, with a small smpnet on few of scikit-learn's digits.

    python -m benchmarks.papers.smp_ablation [SETTING ...] [--seeds N] [--epochs N] [--threads N] [--output FILE]

What learns (Table 6), how far points are spread at the start (Table 7), their initial radius (Table 8) and their number
(Table 9). 16 x 16 images, 300 for training and 450 for testing, two blocks. One setting changes at a time, from those
of the release. Without a name all run. Prints test accuracies in percent, mean and standard deviation over seeds.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from rich.progress import track
from torch.nn import functional as F

from benchmarks.common import arguments, few_digits, new_parser, read_results, summary, write_results
from timm_contconv.cli.digits import Digits, train_on_digits
from timm_contconv.models.smpnet import SmpNet

SIZE, TRAINING_IMAGES = 16, 300
RELEASE = "released settings"
SETTINGS: dict[str, dict[str, Any]] = {
    RELEASE: {},
    "Table 6: neither learns": {"learn_radius": False, "learn_coordinates": False},
    "Table 6: radii learn": {"learn_coordinates": False},
    "Table 6: coordinates learn": {"learn_radius": False},
    "Table 7: spread 0.2": {"coordinate_std": 0.2},
    "Table 7: spread 0.5": {"coordinate_std": 0.5},
    "Table 8: radius 0.18": {"initial_radius": 0.18},
    "Table 8: radius 0.3": {"initial_radius": 0.3},
    "Table 9: 4 points": {"kernel_count": 4},
    "Table 9: 64 points": {"kernel_count": 64},
}


def small_digits() -> Digits:
    """The first images of the training split, and all for testing, averaged down."""
    digits = few_digits(TRAINING_IMAGES)
    train, test = (F.adaptive_avg_pool2d(images, SIZE) for images in (digits.train_images, digits.test_images))
    return dataclasses.replace(digits, train_images=train, test_images=test)


def main() -> None:
    parser = new_parser(__doc__, "smp_ablation.json")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"{', '.join(SETTINGS)}; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    options = arguments(parser)
    if unknown := set(options.settings) - SETTINGS.keys():
        parser.error(f"no such setting: {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    digits = small_digits()
    results: dict[str, dict[str, Any]] = read_results(options.output).get("results", {})
    for name in options.settings or SETTINGS:
        start, values = time.perf_counter(), []
        for seed in track(range(options.seeds), description=name, transient=True):
            torch.manual_seed(seed)
            model = SmpNet(img_size=SIZE, dim=8, width_factors=(1, 2), smp_args=SETTINGS[name])
            values.append(100 * train_on_digits(model, digits, options.epochs, lr=5e-3, seed=seed).accuracy)
        results[name] = {"accuracy": values, "seconds": time.perf_counter() - start}
        print(f"{name}: {summary(values, 1)} %; {results[name]['seconds']:.0f} s", flush=True)
        write_results(options.output, {"seeds": options.seeds, "epochs": options.epochs, "results": results})


if __name__ == "__main__":
    main()
