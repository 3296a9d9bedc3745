"""One CC layer that learns to resize a photograph: what kernel it finds (Shocher et al. 2020, Fig. 3 and 7).

`benchmarks.papers.cc_experiments` runs these.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from resize_right import interp_methods, resize
from rich.progress import track
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import IMAGES
from timm_contconv.layers import ContinuousConv2d

#: the photograph's part that the bicubic layer learns from
CROP = (slice(182, 246), slice(232, 296))
STEPS, LEARNING_RATE = 1500, 1e-2
#: distances at which kernels are drawn, in pixels
LINE = 2 - 4 * (torch.arange(200) + 0.5) / 200
TEST_SCALES = 100

#: (image, scale) -> the resized image
Resizing = Callable[[Tensor, Sequence[float]], Tensor]


def photograph() -> Tensor:
    """A grey part of scikit-learn's "china.jpg", (1, 1, 64, 64), 0 to 1."""
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).float().mean(-1) / 255
    return image[CROP][None, None]


def bicubic_resize(image: Tensor, scale: Sequence[float]) -> Tensor:
    """ResizeRight's bicubic interpolation, without antialiasing."""
    return resize(image, list(scale), interp_method=interp_methods.cubic, antialiasing=False, pad_mode="constant")


def random_scales(count: int, generator: torch.Generator) -> list[tuple[float, float]]:
    """Pairs from 0.3 to 1.3."""
    return [tuple(pair) for pair in (0.3 + torch.rand(count, 2, generator=generator, dtype=torch.float64)).tolist()]


def rotated_gaussian(rows: Tensor, columns: Tensor) -> Tensor:
    """A Gaussian of 0.9 pixels along one diagonal and 0.35 along the other; its integral is 1."""
    along, across = (rows + columns) / 2**0.5, (rows - columns) / 2**0.5
    return torch.exp(-0.5 * ((along / 0.9) ** 2 + (across / 0.35) ** 2)) / (2 * torch.pi * 0.9 * 0.35)


def gaussian_resize(image: Tensor, scale: Sequence[float]) -> Tensor:
    """Resizing by `rotated_gaussian` cut off at support 4, straight from Eq. 1 and 2, with zeros around the image."""
    padded = F.pad(image, (4, 4, 4, 4))[0, 0]
    pixels, distances = [], []
    for size, s in zip(image.shape[2:], scale, strict=True):
        out = math.ceil(size * s)
        grid = torch.arange(out, dtype=torch.float64) / s + (size - 1) / 2 - (out - 1) / (2 * s)
        neighbours = torch.ceil(grid - 2).long()[:, None] + torch.arange(4)
        pixels.append(neighbours + 4)
        distances.append((grid[:, None] - neighbours).float())
    windows = padded[pixels[0][:, None, :, None], pixels[1][None, :, None, :]]
    kernels = rotated_gaussian(distances[0][:, None, :, None], distances[1][None, :, None, :])
    return (windows * kernels).sum((2, 3))[None, None]


def learn_resizing(
    scale: tuple[float, float],
    seed: int,
    resizing: Resizing,
    hidden: Sequence[int] | None = None,
    scales: int = TEST_SCALES,
    steps: int = STEPS,
) -> tuple[ContinuousConv2d, float, list[float]]:
    """A layer trained on one image at one scale, its mean squared error there, and at others."""
    torch.manual_seed(seed)
    image, wanted = photograph(), resizing(photograph(), scale)
    layer = ContinuousConv2d(1, 1, 4, scale=scale, bias=False, hidden=hidden)
    optimizer = torch.optim.Adam(layer.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), description=f"scale {scale[0]:.3f} x {scale[1]:.3f}", transient=True):
        loss = (layer(image) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layer.eval()
    with torch.no_grad():
        train = (layer(image) - wanted).square().mean().item()
        tests = random_scales(scales, torch.Generator().manual_seed(1000))
        return layer, train, [(layer(image, s) - resizing(image, s)).square().mean().item() for s in tests]


def rotated(seeds: int) -> dict[str, Any]:
    """Fig. 3: a rotated anisotropic Gaussian, learned from one image at one random scale; how near the kernel comes."""
    rows: list[dict[str, Any]] = []
    truth = rotated_gaussian(LINE[:, None], LINE)
    best: dict[str, tuple[float, Tensor]] = {}
    for seed in range(seeds):
        scale = random_scales(1, torch.Generator().manual_seed(seed))[0]
        for name, hidden in (("interpolating start", None), ("hidden (64, 64)", (64, 64))):
            layer, train, tests = learn_resizing(scale, seed, gaussian_resize, hidden, scales=20, steps=800)
            kernel = layer.kernel_at(LINE, LINE).detach()[0, 0]
            error = ((kernel - truth).norm() / truth.norm()).item()
            best[name] = min(best.get(name, (error, kernel)), (error, kernel), key=lambda pair: pair[0])
            rows.append({"net": name, "scale": scale, "train": train, "test": statistics.mean(tests), "kernel": error})
            print(
                f"rotated, seed {seed}, {name}, trained at {scale[0]:.3f} x {scale[1]:.3f}: train {train:.2e}, mean of"
                f" 20 scales {statistics.mean(tests):.2e}; kernel differs by {100 * error:.0f} %",
                flush=True,
            )
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    pictures = {"rotated Gaussian": truth, **{name: kernel for name, (_, kernel) in best.items()}}
    for axis, (title, picture) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        axis.imshow(picture, cmap="RdBu_r", vmin=-truth.max(), vmax=truth.max(), extent=(2, -2, -2, 2))
        axis.set_title(title, fontsize=9)
    figure.savefig(IMAGES / "cc_rotated.png", dpi=110)
    return {"rows": rows}


def bicubic(seeds: int) -> dict[str, Any]:
    """Fig. 7: train and test errors after training at a random scale and at 1/2; Fig. 3: the kernels."""
    rows: dict[str, list[dict[str, Any]]] = {"random": [], "1/2": []}
    kernels: dict[str, Tensor] = {}
    for seed in range(seeds):
        scales = {"random": random_scales(1, torch.Generator().manual_seed(seed))[0], "1/2": (0.5, 0.5)}
        for name, scale in scales.items():
            layer, train, tests = learn_resizing(scale, seed, bicubic_resize)
            kernels.setdefault(name, layer.kernel_at(LINE, LINE).detach()[0, 0])
            mean = statistics.mean(tests)
            rows[name].append(
                {"scale": scale, "train": train, "test": mean, "worst": max(tests), "ratio": mean / train}
            )
            print(
                f"bicubic, seed {seed}, trained at {scale[0]:.3f} x {scale[1]:.3f}: train {train:.2e}, mean of"
                f" {TEST_SCALES} scales {mean:.2e} ({mean / train:.1f} x), worst {max(tests):.2e}",
                flush=True,
            )
    variance = photograph().var().item()
    print(f"bicubic: the image's variance is {variance:.4f}")
    worse = statistics.mean(r["test"] for r in rows["1/2"]) / statistics.mean(r["test"] for r in rows["random"])
    print(f"bicubic: test error after training at 1/2 is {worse:.0f} x that after training at a random scale")
    draw_kernels(kernels, rows)
    return {"variance": variance, "half_against_random": worse, **rows}


def draw_kernels(kernels: dict[str, Tensor], rows: dict[str, list[dict[str, Any]]]) -> None:
    """The true kernel, and the two learned ones with their errors."""
    truth = interp_methods.cubic(LINE).unsqueeze(1) * interp_methods.cubic(LINE)
    pictures = {"bicubic": truth, "learned at a random scale": kernels["random"], "learned at 1/2": kernels["1/2"]}
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    for axis, (title, picture) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        axis.imshow(picture, cmap="RdBu_r", vmin=-1, vmax=1, extent=(2, -2, -2, 2))
        row = rows.get({"learned at a random scale": "random", "learned at 1/2": "1/2"}.get(title, ""))
        errors = "" if row is None else f"\ntrain {row[0]['train']:.1e}, other scales {row[0]['test']:.1e}"
        axis.set_title(title + errors, fontsize=9)
    figure.savefig(IMAGES / "cc_bicubic.png", dpi=110)
