"""The experiments of Shocher et al. 2020 with CC layers, on a photograph and on digits from scikit-learn.

    python -m benchmarks.papers.cc_experiments [bicubic] [rotated] [misalignment] [digits] [ensembles] [--seeds 3] ...

bicubic: one layer learns bicubic resizing from one image at one scale, and is tested at 100 others (Fig. 3 and 7).
rotated: the same with an anisotropic Gaussian, turned by 45 degrees, in place of the bicubic kernel (Fig. 3).
misalignment: a 4 x 4 Gaussian applied again and again, by plain convolutions and by CC layers (Fig. 6).
digits: CC-Net and its baseline: accuracy, shift-equivariance (Table 1's protocol) and scale ensembles.
ensembles: scale ensembles of a CC-Net that is trained with other scales in each batch.

Without a name all five run. Every number in docs/papers/cc.md is printed by this script, recorded in
benchmarks/results/cc_experiments.json; pictures go to docs/images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc
from benchmarks.common import IMAGES, arguments, new_parser, read_results, summary, write_results
from timm_contconv.cli.digits import Digits, accuracy, load_digits, train_on_digits
from timm_contconv.layers import ContinuousConv2d
from timm_contconv.layers.cc import InternalNet
from timm_contconv.models.ccnet import CC_SCALE

from .cc_resizing import bicubic, rotated

DIMS = 16
MAX_SHIFTS = (1, 2, 4, 8)


def gaussian(distance: Tensor) -> Tensor:
    """Falls to 1/e at a distance of 0.71 pixels."""
    return torch.exp(-2 * distance**2) / 1.2533


def gaussian_features(rows: Tensor, columns: Tensor, **_: Tensor) -> Tensor:
    """One feature, a Gaussian half a pixel wide, and the one that the last layer's bias takes."""
    kernel = gaussian(rows).unsqueeze(1) * gaussian(columns)
    return F.pad(kernel.unsqueeze(-1), (0, 1), value=1.0)


class GaussianNet(InternalNet):
    """An internal net that is a fixed Gaussian."""

    function = staticmethod(gaussian_features)


def gaussian_layer() -> ContinuousConv2d:
    """A layer of scale 1 whose kernel is the Gaussian."""
    layer = ContinuousConv2d(1, 1, 4, scale=1, bias=False)
    layer.net = GaussianNet(1, 1, layer.net.plateaus, hidden=(1,))
    with torch.no_grad():
        layer.net.weight.copy_(torch.tensor([[[1.0, 0.0]]]))
    return layer.eval()


def misalignment() -> dict[str, Any]:
    """Fig. 6: where a white cross is after 4 x 4 convolutions, plain and CC."""
    layer = gaussian_layer()
    taps = gaussian(torch.arange(4) - 1.5)
    cross = torch.zeros(1, 1, 65, 65)
    cross[..., 32, 26:39] = cross[..., 26:39, 32] = 1
    pictures, moved = {0: (cross, cross)}, {}
    plain = ours = cross
    with torch.no_grad():
        for step in range(1, 21):
            plain = F.conv2d(F.pad(plain, (2, 1, 2, 1)), (taps.unsqueeze(1) * taps)[None, None])
            ours = layer(ours)
            moved[step] = tuple(centre(image)[0] - 32 for image in (plain, ours))
            pictures[step] = (plain, ours)
    for step in (1, 10, 20):
        print(
            f"misalignment: after {step} convolutions moved by {moved[step][0]:.2f} (plain), {moved[step][1]:.2f} (CC)"
        )
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for row, (name, axes) in enumerate(zip(("plain", "CC"), figure.subplots(2, 4), strict=True)):
        for axis, step in zip(axes, (0, 5, 10, 20), strict=True):
            axis.imshow(pictures[step][row][0, 0], cmap="gray")
            axis.axhline(32, color="C1", linewidth=0.6)
            axis.axvline(32, color="C1", linewidth=0.6)
            axis.set(xticks=[], yticks=[], title=f"{name}, {step} times")
    figure.savefig(IMAGES / "cc_misalignment.png", dpi=110)
    return {"moved": moved}


def centre(image: Tensor) -> tuple[float, float]:
    """Centre of mass, row and column."""
    mass = image[0, 0] / image.sum()
    pixels = torch.arange(mass.shape[0], dtype=mass.dtype)
    return float(mass.sum(1) @ pixels), float(mass.sum(0) @ pixels)


@torch.no_grad()
def similarity(model: nn.Module, make: Callable[[int], Tensor], reach: int) -> float:
    """Mean cosine similarity of the last map and that of shifted images, shifted back (Table 1's protocol).

    Args:
        model: has `forward_features`, which makes images four times smaller.
        make: images with a margin of so many pixels.
        reach: the largest shift, in pixels.
    """
    generator = torch.Generator().manual_seed(reach)
    canvas, values = make(reach), []
    size = canvas.shape[-1] - 2 * reach
    window = lambda dy, dx: canvas[..., reach - dy : reach - dy + size, reach - dx : reach - dx + size]  # noqa: E731
    original = model.forward_features(window(0, 0))
    for _ in range(8):
        dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        back = shifted_back(model.forward_features(window(dy, dx)), dy / 4, dx / 4)
        pair = [y[..., 2:-2, 2:-2].flatten(1) for y in (original, back)]
        values.append(F.cosine_similarity(*pair).mean().item())
    return statistics.mean(values)


def shifted_back(y: Tensor, dy: float, dx: float) -> Tensor:
    """y(i + d) by cubic interpolation."""
    size = y.shape[-1]
    pixels = torch.arange(size) + 0.5
    rows, columns = torch.meshgrid(2 * (pixels + dy) / size - 1, 2 * (pixels + dx) / size - 1, indexing="ij")
    grid = torch.stack([columns, rows], -1).expand(y.shape[0], -1, -1, -1)
    return F.grid_sample(y, grid, mode="bicubic", padding_mode="border", align_corners=False)


def sequences() -> list[dict[str, tuple[float, float]]]:
    """The net's own scales; rows and columns in turns; columns and rows in turns."""
    pair = [(1.0, CC_SCALE**2), (CC_SCALE**2, 1.0)]
    names = [f"layers.{index}.conv" for index in range(1, 7)]
    turns = [dict(zip(names, order * 3, strict=True)) for order in (pair, pair[::-1])]
    return [{}, *turns]


def digits(seeds: int, epochs: int) -> dict[str, Any]:
    """Accuracy, similarity under shifts and ensembles of CC-Net and its baseline."""
    data = load_digits()
    results: dict[str, Any] = {"accuracy": {}, "similarity": {}, "ensembles": {}}
    for seed in range(seeds):
        for name in ("ccnet_baseline", "ccnet"):
            torch.manual_seed(seed)
            model = timm.create_model(name, dims=DIMS)
            percent = 100 * train_on_digits(model, data, epochs, lr=2e-3, seed=seed).accuracy
            results["accuracy"].setdefault(name, []).append(percent)
            print(f"digits, seed {seed}, {name}: {percent:.2f} % of the test images", flush=True)
            model.eval()
            for kind, make in inputs(data).items():
                for reach in MAX_SHIFTS:
                    key = f"{kind}, {name}, {reach}"
                    results["similarity"].setdefault(key, []).append(similarity(model, make, reach))
            if name == "ccnet":
                for count in (1, 2, 3):
                    correct = 100 * accuracy(tcc.scale_ensemble(model, sequences()[:count]).eval(), data)
                    results["ensembles"].setdefault(str(count), []).append(correct)
    for group in ("accuracy", "similarity", "ensembles"):
        for key, values in results[group].items():
            print(f"digits, {group}: {key}: {summary(values, 4)} over {len(values)} seeds")
    return results


class RandomScales(nn.Module):
    """A CC-Net with one of several sequences of scales, drawn anew in each training pass."""

    def __init__(self, model: nn.Module, pool: Sequence[dict[str, tuple[float, float]]]) -> None:
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.model(x)
        with tcc.cc_scales(self.model, self.pool[int(torch.randint(len(self.pool), ()))]):
            return self.model(x)


def random_sequences(count: int, seed: int) -> list[dict[str, tuple[float, float]]]:
    """The net's own scales, and random ones up to a sixth smaller or larger, with the same product and last size."""
    generator, names = torch.Generator().manual_seed(seed), [f"layers.{index}.conv" for index in range(1, 7)]
    found: list[dict[str, tuple[float, float]]] = [{}]
    while len(found) < count:
        change = 0.3 * torch.rand(6, 2, generator=generator, dtype=torch.float64) - 0.15
        scales = CC_SCALE * (change - change.mean(0)).exp()
        if all(last_size(column) == 8 for column in scales.T.tolist()):
            found.append({name: (row[0], row[1]) for name, row in zip(names, scales.tolist(), strict=True)})
    return found


def last_size(scales: Sequence[float], size: int = 32) -> int:
    """Pixels after layers with these scales."""
    for scale in scales:
        size = int(size * scale + 0.5)
    return size


def ensembles(seeds: int, epochs: int) -> dict[str, Any]:
    """Accuracy of single sequences and of ensembles, after training with other scales in each batch."""
    data, results = load_digits(), {}
    for seed in track(range(seeds), description="ensembles", transient=True):
        pool = random_sequences(16, seed)
        torch.manual_seed(seed)
        model = timm.create_model("ccnet", dims=DIMS)
        train_on_digits(RandomScales(model, pool), data, epochs, lr=2e-3, seed=seed)
        model.eval()
        single = [100 * accuracy(tcc.scale_ensemble(model, [scales]).eval(), data) for scales in pool]
        row = {"own scales": single[0], "mean of 16 sequences": statistics.mean(single)}
        for count in (2, 3, 8, 16):
            row[f"ensemble of {count}"] = 100 * accuracy(tcc.scale_ensemble(model, pool[:count]).eval(), data)
            median = tcc.scale_ensemble(model, pool[:count], "median").eval()
            row[f"ensemble of {count}, median"] = 100 * accuracy(median, data)
        for key, value in row.items():
            results.setdefault(key, []).append(value)
        print(f"ensembles, seed {seed}: " + ", ".join(f"{key} {value:.2f} %" for key, value in row.items()), flush=True)
    for key, values in results.items():
        print(f"ensembles: {key}: {summary(values)} % over {len(values)} seeds")
    return results


def inputs(data: Digits) -> dict[str, Callable[[int], Tensor]]:
    """Test images, and Gaussian noise, with a margin to shift them in."""
    images, background = data.test_images[:200], float(data.test_images.min())
    noise = torch.Generator().manual_seed(0)
    return {
        "digits": lambda reach: F.pad(images, (reach,) * 4, value=background),
        "noise": lambda reach: torch.randn(200, 3, 32 + 2 * reach, 32 + 2 * reach, generator=noise),
    }


def main() -> None:
    parser = new_parser(__doc__, "cc_experiments.json")
    names = ("bicubic", "rotated", "misalignment", "digits", "ensembles")
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"{', '.join(names)}; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    options = arguments(parser)
    if unknown := set(options.experiments) - set(names):
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "bicubic": lambda: bicubic(options.seeds),
        "rotated": lambda: rotated(options.seeds),
        "misalignment": misalignment,
        "digits": lambda: digits(options.seeds, options.epochs),
        "ensembles": lambda: ensembles(options.seeds, options.epochs),
    }
    for name in options.experiments or names:
        found = {"seeds": options.seeds, "epochs": options.epochs, **calls[name]()}
        write_results(options.output, {**read_results(options.output), name: found})


if __name__ == "__main__":
    main()
