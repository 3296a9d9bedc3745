"""FlexNet trained on small digits and run on large ones, with and without the alias-free penalty.

    python -m benchmarks.papers.flex_digits [KIND ...] [--seeds N] [--epochs N] [--threads N] [--output FILE]

scikit-learn's digits at 16 x 16 train a small FlexNet; `tcc.at_resolution(model, 16, 32)` then runs it on the same
digits at 32 x 32 (the protocol of Romero et al. 2022, Table 4, on other data). Kinds of training: without the penalty,
with that on the MAGNets (the paper's choice), and with that on MAGNets and masks; SIRENs in place of MAGNets, and 3 x 3
convolutions in place of FlexConvs.

The paper trains for 270,000 steps, in which the penalty slows the sines down; here there are some hundred. So where
there is a penalty it is minimised on its own first, which needs no images. A fourth kind shows what that does alone:
it starts so and trains without the penalty.

Prints test accuracies (450 of 1,797 images) at both resolutions and the change between them, mean and standard
deviation over seeds.
"""

from __future__ import annotations

import functools
import math
import statistics
import time

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks.common import arguments, new_parser, read_results, write_results
from timm_contconv.cli.digits import Digits, load_digits
from timm_contconv.layers import FlexConv2d
from timm_contconv.models.flexnet import FlexNet
from timm_contconv.models.full_resolution import FullResolutionNet

SOURCE, TARGET = 16, 32
PENALTY_FACTOR = 0.1  # appendix A.2; the released code sums over layers, `tcc.penalty` is their mean
LEARNING_RATE = 0.01  # appendix D.2
BATCH = 64
SIREN, PLAIN = "SIREN", "3 x 3 convolutions"
KINDS = ("no penalty", "no penalty after the start", "MAGNet", "MAGNet and mask", SIREN, PLAIN)


def network(kind: str) -> FullResolutionNet:
    """Two blocks, 12 and 18 channels."""
    if kind == PLAIN:
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        return FullResolutionNet(1, 10, "avg", conv, conv, nn.BatchNorm2d, 12, (1, 1.5), 0.0, 0.0, 0.0)
    flex = {"penalize_mask": kind == "MAGNet and mask", "kernel_net": "siren" if kind == SIREN else "magnet"}
    model = FlexNet(in_chans=1, img_size=SOURCE, dim=12, width_factors=(1, 1.5), dropout=0.0, flex_args=flex)
    if kind not in ("no penalty", SIREN):
        slow_down_(model)
    return model


def slow_down_(model: FlexNet, lr: float = 0.2, steps: int = 3000, enough: float = 1e-4) -> None:
    """Minimise the penalty in the sines' weights and the envelopes' widths."""
    layers = [m for m in model.modules() if isinstance(m, FlexConv2d)]
    optimizer = torch.optim.Adam([p for layer in layers for p in (layer.kernel.sine_weight, layer.kernel.gamma)], lr)
    for _ in range(steps):
        loss = tcc.penalty(model)
        if loss < enough:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(kind: str, digits: Digits, seed: int, epochs: int) -> FullResolutionNet:
    """A network trained with Adam, a warm-up and a cosine cycle."""
    torch.manual_seed(seed)
    model = network(kind)
    torch.manual_seed(seed)
    images, labels = at(digits.train_images, SOURCE), digits.train_labels
    optimizer = torch.optim.Adam(tcc.param_groups(model, lr=LEARNING_RATE, weight_decay=0.0))
    factor = PENALTY_FACTOR * sum(isinstance(m, FlexConv2d) for m in model.modules())
    rates = [group["lr"] * group.pop("lr_scale") for group in optimizer.param_groups]
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs * steps, pct_start=0.1)
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(BATCH)[:steps]:
            loss = F.cross_entropy(model(images[index]), labels[index])
            if kind.startswith("MAGNet"):
                loss = loss + factor * tcc.penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tcc.constrain_(model)
    return model.eval()


def at(images: Tensor, size: int) -> Tensor:
    """One channel of the 32 x 32 images, averaged down."""
    return F.adaptive_avg_pool2d(images[:, :1], size)


@torch.no_grad()
def accuracy(model: FullResolutionNet, digits: Digits, size: int) -> float:
    """In percent, on the test images at a resolution."""
    return 100 * (model(at(digits.test_images, size)).argmax(1) == digits.test_labels).float().mean().item()


def measure(kind: str, digits: Digits, seed: int, epochs: int) -> dict[str, float]:
    """Accuracies at both resolutions, and the mean over layers of the highest frequency."""
    model = train(kind, digits, seed, epochs)
    layers = [m for m in model.modules() if isinstance(m, FlexConv2d)]
    result = {"source": accuracy(model, digits, SOURCE)}
    if kind not in (SIREN, PLAIN):
        result["frequency"] = statistics.mean(layer.kernel.max_frequency(mask=False) for layer in layers)
    if layers:
        tcc.at_resolution(model, SOURCE, TARGET)
    return {**result, "target": accuracy(model, digits, TARGET)}


def main() -> None:
    parser = new_parser(__doc__, "flex_digits.json")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; default all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    options = arguments(parser)
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    digits = load_digits()
    results: dict[str, dict[str, float]] = read_results(options.output).get("results", {})
    start = time.perf_counter()
    for kind in options.kinds or KINDS:
        seeds = track(range(options.seeds), description=kind, transient=True)
        runs = [measure(kind, digits, s, options.epochs) for s in seeds]
        changes = [run["target"] - run["source"] for run in runs]
        results[kind] = {
            **{f"{key}_mean": statistics.mean(run[key] for run in runs) for key in runs[0]},
            **{f"{key}_std": statistics.stdev(run[key] for run in runs) for key in runs[0] if len(runs) > 1},
            "change_mean": statistics.mean(changes),
            "change_std": statistics.stdev(changes) if len(changes) > 1 else 0.0,
            "changes": changes,
        }  # fmt: skip
        found = results[kind]
        print(
            f"{kind}: {found['source_mean']:.1f} % at {SOURCE}, {found['target_mean']:.1f} % at {TARGET}: change"
            f" {found['change_mean']:+.1f} ± {found['change_std']:.1f} points; highest frequency"
            f" {found.get('frequency_mean', math.nan):.1f} (Nyquist {SOURCE / 4:g});"
            f" {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        write_results(options.output, {"seeds": options.seeds, "epochs": options.epochs, "results": results})


if __name__ == "__main__":
    main()
