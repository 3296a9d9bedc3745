"""SMPConv's function fitting (Kim and Park 2023, Fig. 3): points that move against points that stay.

    python -m benchmarks.papers.smp_fit [--steps N] [--seeds N] [--output FILE] [--picture FILE]

204 points fit a sinusoid on a 51 x 51 grid. Both kinds start from the same places, uniform over the grid, and
train weights and radii in the same way; one kind trains its coordinates too. Prints mean squared errors, medians
over seeds. Fails where moving points are not four times as near as fixed ones.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import IMAGES, arguments, new_parser, require, write_results
from timm_contconv.layers import SmpConv2d

SIZE, POINTS = 51, 204
INITIAL_RADIUS = 0.2
LEARNING_RATE = 1e-2


def targets() -> dict[str, Tensor]:
    """Functions on the grid, by formula."""
    line = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return {
        "sin(3π(x + y))": torch.sin(3 * math.pi * (x + y)),
        "sin(2πx) sin(2πy)": torch.sin(2 * math.pi * x) * torch.sin(2 * math.pi * y),
    }


def fit(target: Tensor, moving: bool, steps: int, seed: int) -> tuple[float, SmpConv2d]:
    """Mean squared error after training, and the layer whose kernel is the fit."""
    torch.manual_seed(seed)
    layer = SmpConv2d(1, 1, SIZE, kernel_count=POINTS, bias=False, initial_radius=INITIAL_RADIUS)
    with torch.no_grad():
        layer.kernel.coordinate.uniform_(-1, 1)
    layer.kernel.coordinate.requires_grad_(moving)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (layer.weight[0, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        layer.constrain_()
    with torch.no_grad():
        return (layer.weight[0, 0] - target).square().mean().item(), layer


def draw(rows: list[tuple[str, Tensor, SmpConv2d, SmpConv2d]], path: Path) -> None:
    """Each target with its two fits and their points."""
    figure = Figure(figsize=(8.4, 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for (name, target, moving, fixed), line in zip(rows, axes, strict=True):
        for axis, title, layer in zip(
            line, (name, "moving points", "fixed points"), (None, moving, fixed), strict=True
        ):
            image = target if layer is None else layer.weight[0, 0].detach()
            axis.imshow(image, cmap="RdBu_r", vmin=-1, vmax=1, extent=(-1, 1, 1, -1))
            if layer is not None:
                error = (image - target).square().mean().item()
                title = f"{title}: error {error:.4f}"
                rows_, columns = layer.kernel.coordinate.detach()[0].T
                axis.plot(columns, rows_, "k.", markersize=2)
            axis.set(title=title, xlim=(-1, 1), ylim=(1, -1), xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = new_parser(__doc__, "smp_fit.json")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--picture", type=Path, default=IMAGES / "smp_fit.png")
    options = arguments(parser)
    results, rows = {}, []
    for name, target in targets().items():
        fits = {kind: [fit(target, kind, options.steps, s) for s in range(options.seeds)] for kind in (True, False)}
        moving, fixed = (statistics.median(error for error, _ in fits[kind]) for kind in (True, False))
        ratios = [b / a for (a, _), (b, _) in zip(fits[True], fits[False], strict=True)]
        results[name] = {
            "variance": target.var().item(), "moving": moving, "fixed": fixed,
            "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        }  # fmt: skip
        rows.append((name, target, fits[True][0][1], fits[False][0][1]))
        print(
            f"{name}: variance {target.var().item():.3f}, mean squared error moving {moving:.4f}, fixed {fixed:.4f},"
            f" ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
            flush=True,
        )
    settings = {"steps": options.steps, "seeds": options.seeds, "size": SIZE, "points": POINTS}
    write_results(options.output, {**settings, "results": results})
    draw(rows, options.picture)
    for name, found in results.items():
        require(found["ratio_median"] > 4, f"{name}: moving points fit four times better than fixed ones")


if __name__ == "__main__":
    main()
