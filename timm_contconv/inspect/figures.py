"""Pictures of kernels. Needs matplotlib (the extra `viz`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ..layers import ContinuousConv2d, DclsConv2d, FlexConv1d, FlexConv2d, GaussianEnvelopeConv2d, KernelConv
from ..layers.envelope import envelope_filter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["continuous_kernel_figure", "envelope_figure", "frequency_figure", "kernel_figure", "save_kernel_figure"]


Layer = TypeVar("Layer", KernelConv, ContinuousConv2d)


def kernel_figure(model: nn.Module, layers: int = 4, channels: int = 6) -> Figure:
    """Draw the 2-D kernels of `KernelConv` layers, and the positions of their elements for DCLS.

    Args:
        model: a model that holds such layers.
        layers: rows of the picture, one per layer, evenly spread over the model.
        channels: columns of the picture: the first output channels of each layer.

    Raises:
        ValueError: the model holds no such layer.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, KernelConv) and m.ndim == 2]
    _require(found, model, "2-D constructed convolution")
    figure, rows = _kernel_grid(found, layers, channels)
    for layer, line in rows:
        with torch.no_grad():
            kernels = layer.weight[:, 0].float().cpu()
        for channel, axis in enumerate(line):
            _draw_kernel(axis, kernels[channel])
            _draw_elements(axis, layer, channel)
    return figure


def save_kernel_figure(model: nn.Module, path: str | Path, layers: int = 4, channels: int = 6) -> Path:
    """Write the picture of a model's kernels to a file, in the format of its suffix.

    That is `continuous_kernel_figure` for a model with CC layers, `envelope_figure` for one that has envelopes and no
    `KernelConv`, else `kernel_figure`.
    """
    constructed = any(isinstance(module, KernelConv) for module in model.modules())
    envelopes = any(isinstance(module, GaussianEnvelopeConv2d) for module in model.modules())
    if any(isinstance(module, ContinuousConv2d) for module in model.modules()):
        figure = continuous_kernel_figure(model, layers, channels)
    else:
        figure = envelope_figure(model) if envelopes and not constructed else kernel_figure(model, layers, channels)
    figure.savefig(path, dpi=120)
    return Path(path)


def continuous_kernel_figure(model: nn.Module, layers: int = 4, channels: int = 6, samples: int = 200) -> Figure:
    """Draw finely sampled continuous kernels of CC layers, as Shocher et al. 2020, Fig. 3.

    A pixel of a picture is the distance of a neighbour from a point on the projected grid, in the order of a kernel's
    pixels: from half the support below and right of the point to half above and left. Dots show the distances at which
    the layer's `weight` samples the kernel.

    Args:
        model: a `ContinuousConv2d`, or a model that holds some.
        layers: rows of the picture, one per layer, evenly spread over the model.
        channels: columns of the picture: the first output channels of each layer, for the first input channel.
        samples: samples along each axis.

    Raises:
        ValueError: the model holds no `ContinuousConv2d`.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, ContinuousConv2d)]
    _require(found, model, "ContinuousConv2d")
    figure, rows = _kernel_grid(found, layers, channels)
    for layer, line in rows:
        kernels, offsets = layer.sampled_kernel(samples, len(line)).float().cpu(), layer.weight_distances()
        for channel, axis in enumerate(line):
            _draw_kernel(axis, kernels[channel])
            dots = [(size / 2 - d) * samples / size - 0.5 for d, size in zip(offsets, layer.kernel_size, strict=True)]
            axis.plot(*torch.meshgrid(dots[1], dots[0], indexing="xy"), "k.", markersize=2.5)
    return figure


def envelope_figure(model: nn.Module) -> Figure:
    """Draw Gaussian envelopes as Kobayashi 2023, Fig. 4: sigma of every channel by layer, and filters as curves.

    1x1 kernels, which lie on the identity path of a ResNet, have another colour. The curves are the filters of each
    layer's mean sigma (solid) and largest sigma (dotted).

    Raises:
        ValueError: the model holds no `GaussianEnvelopeConv2d`.
    """
    from matplotlib.figure import Figure

    found = [(name, m) for name, m in model.named_modules() if isinstance(m, GaussianEnvelopeConv2d)]
    _require(found, model, "GaussianEnvelopeConv2d")
    figure = Figure(figsize=(6 + 0.6 * len(found), 4), layout="constrained")
    widths, curves = figure.subplots(1, 2, width_ratios=(1 + 0.2 * len(found), 2))
    for index, (name, layer) in enumerate(found):
        sigma = layer.sigma.detach().float().cpu()
        _draw_widths(widths, index, sigma, "C1" if max(layer.kernel_size) == 1 else "C0")
        _draw_envelope(curves, layer, sigma, f"C{index}", name)
    widths.set_xticks(range(len(found)), [name for name, _ in found], rotation=45, ha="right", fontsize=7)
    widths.set(ylabel="σ in pixels", title="(a) σ of every channel; 1×1 kernels in orange")
    widths.set_ylim(0, 1.1 * max(float(layer.sigma.detach().max()) for _, layer in found))
    curves.set(xlabel="pixels", title="(b) envelopes: mean σ, largest σ dotted")
    curves.legend(fontsize=7)
    return figure


def frequency_figure(model: nn.Module) -> Figure:
    """Draw the highest frequency of every FlexConv and its grid's limit (Romero et al. 2022, Eq. 22 and 24).

    Bars are the parts of the MAGNet and of the mask; a line marks the Nyquist frequency. The unit is cycles per unit of
    coordinate; a kernel spans two units. Kernels under the line can be sampled at higher resolutions without aliasing.

    Raises:
        ValueError: the model holds no FlexConv.
    """
    from matplotlib.figure import Figure

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, FlexConv1d | FlexConv2d)]
    _require(found, model, "FlexConv")
    figure = Figure(figsize=(2.5 + 0.35 * len(found), 3.5), layout="constrained")
    axis = figure.subplots()
    places = range(len(found))
    magnets = [layer.kernel.max_frequency(mask=False) for _, layer in found]
    masks = [layer.kernel.max_frequency() - magnet for (_, layer), magnet in zip(found, magnets, strict=True)]
    axis.bar(places, magnets, label="MAGNet")
    axis.bar(places, masks, bottom=magnets, label="mask")
    nyquist = [layer.kernel.nyquist_frequency for _, layer in found]
    axis.hlines(nyquist, [p - 0.5 for p in places], [p + 0.5 for p in places], "black", label="Nyquist")
    axis.set_xticks(places, [name for name, _ in found], rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="cycles per unit", title="highest frequency of the kernels")
    axis.legend(fontsize=7)
    return figure


def _require(found: Sequence[tuple[str, nn.Module]], model: nn.Module, kind: str) -> None:
    if not found:
        raise ValueError(f"model: this {type(model).__name__} holds no {kind} to draw")


def _kernel_grid(
    found: Sequence[tuple[str, Layer]], layers: int, channels: int
) -> tuple[Figure, list[tuple[Layer, Sequence[Axes]]]]:
    """A figure with a row of axes for each of some layers, evenly spread, and (layer, row) for each."""
    from matplotlib.figure import Figure

    count = min(layers, len(found))
    shown = [found[index] for index in torch.linspace(0, len(found) - 1, count).round().int().tolist()]
    columns = min(channels, *(layer.out_channels for _, layer in shown))
    figure = Figure(figsize=(1.7 * columns, 1.9 * count), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False)
    for (name, _), line in zip(shown, axes, strict=True):
        line[0].set_title(name, loc="left", fontsize=8)
    return figure, [(layer, line) for (_, layer), line in zip(shown, axes, strict=True)]


def _draw_widths(axis: Axes, index: int, sigma: torch.Tensor, colour: str) -> None:
    """One dot per channel, spread sideways so that dots do not overlap."""
    spread = torch.linspace(-0.25, 0.25, len(sigma)) if len(sigma) > 1 else torch.zeros(1)
    axis.plot(index + spread, sigma, ".", color=colour, markersize=3, alpha=0.5)
    axis.plot([index - 0.3, index + 0.3], [sigma.mean()] * 2, color="black", linewidth=1)


def _draw_envelope(axis: Axes, layer: GaussianEnvelopeConv2d, sigma: torch.Tensor, colour: str, name: str) -> None:
    size = layer.spec.envelope_size
    half = size // 2
    mean, largest = envelope_filter(torch.stack([sigma.mean(), sigma.max()]).square(), size)
    pixels = torch.arange(-half, half + 1)
    axis.plot(pixels, mean, color=colour, label=f"{name}, σ {sigma.mean():.2f}", linewidth=1.2)
    axis.plot(pixels, largest, color=colour, linestyle=":", linewidth=1.2)


def _draw_kernel(axis: Axes, kernel: torch.Tensor) -> None:
    limit = float(kernel.abs().max()) or 1.0
    axis.imshow(kernel.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_elements(axis: Axes, layer: KernelConv, channel: int) -> None:
    position = layer.geometry.get("position")
    if not isinstance(layer, DclsConv2d) or position is None or len(position) < 2:
        return
    rows, columns = (position[d, channel, 0].detach().float().cpu() + layer.kernel_size[d] // 2 for d in range(2))
    axis.plot(columns, rows, "k.", markersize=2.5)
    axis.set_xlim(-0.5, layer.kernel_size[1] - 0.5)
    axis.set_ylim(layer.kernel_size[0] - 0.5, -0.5)
