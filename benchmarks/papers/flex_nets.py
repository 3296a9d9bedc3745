"""What kernel networks can describe: MAGNets, Gabor and Fourier networks, SIRENs, Gaussian derivatives.

    python -m benchmarks.papers.flex_nets [--steps N] [--seeds N] [--threads N] [--output FILE] [--picture FILE]

The targets of Romero et al. 2022, Fig. 4: Gabor functions of 2 and 6 cycles per unit and noise on 33 x 33 pixels, and
an 11 x 11 edge detector as in the first layer of AlexNet (drawn by formula: no trained weights are needed). Every
network has 32 hidden channels and trains 1,000 steps with Adam (0.01; SIRENs, which diverge with it, 0.001). MAGNets
and Gabor networks are fitted with both initialisations of their envelopes (Table 5). Prints the part of the target's
energy that is left, in percent: the median over seeds, and the range.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import IMAGES, arguments, new_parser, write_results
from benchmarks.papers.flex_fit import fit_njet, gabor
from timm_contconv.layers import FlexConv2d

NETS: dict[str, dict[str, Any]] = {
    "MAGNet": {"kernel_net": "magnet"},
    "MAGNet, old init": {"kernel_net": "magnet", "gamma_init": "equal"},
    "Gabor": {"kernel_net": "gabor"},
    "Gabor, new init": {"kernel_net": "gabor", "gamma_init": "by_layer"},
    "Fourier": {"kernel_net": "fourier"},
    "SIREN": {"kernel_net": "siren"},
}
NJET = "Gaussian derivatives"


def edge(size: int = 11) -> Tensor:
    """An oriented edge detector, (size, size): a sine under a Gaussian, turned by 30 degrees."""
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    along = 0.87 * axis[:, None] + 0.5 * axis
    across = 0.87 * axis - 0.5 * axis[:, None]
    return torch.sin(5 * along) * torch.exp(-2 * along.square() - 3 * across.square())


def targets() -> dict[str, Tensor]:
    noise = torch.randn(33, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"Gabor, 2 cycles": gabor(2), "Gabor, 6 cycles": gabor(6), "noise": noise, "edge, 11 x 11": edge()}


def fit(target: Tensor, settings: Mapping[str, Any], steps: int, seed: int) -> tuple[float, Tensor]:
    """The part of the energy that is left after training, and the kernel."""
    torch.manual_seed(seed)
    kernel = FlexConv2d(1, 1, len(target), mask=False, **settings).kernel
    optimizer = torch.optim.Adam(kernel.parameters(), 0.001 if settings["kernel_net"] == "siren" else 0.01)
    wanted = target.float()
    for _ in range(steps):
        loss = F.mse_loss(kernel()[0, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = kernel().detach()[0, 0]
    return left(found, wanted), found


def left(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).square().sum() / wanted.square().sum()).item()


def draw(pictures: dict[str, dict[str, Tensor]], path: Path) -> None:
    """A row per target: the target and what each network makes of it."""
    columns = ["target", *NETS, NJET]
    figure = Figure(figsize=(1.4 * len(columns), 1.5 * len(pictures)), layout="constrained")
    for axes, (name, row) in zip(figure.subplots(len(pictures), len(columns)), pictures.items(), strict=True):
        limit = row["target"].abs().max().item()
        for axis, column in zip(axes, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.set_title(name if column == "target" else column, fontsize=7)
            if column in row:
                axis.imshow(row[column], cmap="RdBu_r", vmin=-limit, vmax=limit)
            else:
                axis.set_axis_off()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = new_parser(__doc__, "flex_nets.json")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path, default=IMAGES / "flex_nets.png")
    options = arguments(parser)
    results: dict[str, dict[str, list[float]]] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    for name, target in targets().items():
        results[name], pictures[name] = {}, {"target": target}
        for net, settings in NETS.items():
            seeds = track(range(options.seeds), description=f"{name}, {net}", transient=True)
            fits = [fit(target, settings, options.steps, seed) for seed in seeds]
            results[name][net] = [error for error, _ in fits]
            pictures[name][net] = sorted(fits, key=lambda pair: pair[0])[len(fits) // 2][1]
        if len(target) == 33:  # the derivatives are set up for this grid
            _, pictures[name][NJET] = fit_njet(target, options.steps)
            results[name][NJET] = [left(pictures[name][NJET], target)]
        for net, errors in results[name].items():
            middle = 100 * statistics.median(errors)
            print(f"{name}, {net}: {middle:.2g} % ({100 * min(errors):.2g} to {100 * max(errors):.2g})", flush=True)
        write_results(options.output, {"steps": options.steps, "seeds": options.seeds, "results": results})
    draw(pictures, options.picture)


if __name__ == "__main__":
    main()
