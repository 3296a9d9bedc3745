"""ShownLayer: what the pictures of one layer need, taken from the model at one moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement
from ..layers.core.plain import PlainConv
from ..layers.core.shown import Elements, Quantity, ShownKernels, one_per_output
from ..patching.record import Start, get_record
from ..patching.restore import outermost_layers

__all__ = ["Layers", "ShownLayer", "as_layers", "labels", "layers_of", "shown_layers"]


@dataclasses.dataclass(frozen=True)
class ShownLayer:
    """What pictures show of one layer. Tensors are on the CPU, in float32, and do not change with the model.

    Attributes:
        name: module name.
        label: short name for axes: the parts of the module name that differ between layers.
        summary: the layer in a few words.
        kernels: of every output channel; two spatial dimensions (1-D kernels as one row, 3-D ones by their middle).
        kernel_size: of the shown kernels, in pixels.
        quantities: numbers about its geometry.
        highest_frequency: f+ in cycles per pixel; None if the kernels are not band-limited.
        start: what it started from; None if that is not known.
    """

    name: str
    label: str
    summary: str
    kernels: ShownKernels
    kernel_size: tuple[int, ...]
    quantities: tuple[Quantity, ...]
    highest_frequency: float | None
    start: Start | None

    def moved(self, quantity: Quantity) -> Tensor | None:
        """How far each value of a quantity is from where it started, (N,); None if that is not known."""
        for before in () if self.start is None else self.start.quantities:
            if before.name == quantity.name and before.values.shape == quantity.values.shape:
                return torch.linalg.vector_norm(quantity.values - before.values, dim=1)
        return None


#: a model, or layers that `shown_layers` made of one
Layers = nn.Module | Sequence[ShownLayer]


def as_layers(model: Layers) -> Sequence[ShownLayer]:
    """The shown layers of a model."""
    return shown_layers(model) if isinstance(model, nn.Module) else model


def layers_of(model: nn.Module) -> dict[str, ConvReplacement]:
    """The layers of this package in a model, by name, without those inside another.

    Raises:
        ValueError: there are none, or they have no values.
    """
    found = outermost_layers(model)
    if not found:
        raise ValueError(
            f"model: this {type(model).__name__} holds no layer of timm_contconv, so there is nothing to show;"
            " tcc.patch(model, recipe) puts some into it"
        )
    if any(parameter.is_meta for layer in found.values() for parameter in layer.parameters()):
        raise ValueError("model: is on the meta device and has no values to show; create it on the CPU or load it")
    return found


@torch.no_grad()
def shown_layers(model: nn.Module, start: nn.Module | None = None) -> list[ShownLayer]:
    """What pictures show of every layer of this package in a model.

    Args:
        model: a model that holds such layers.
        start: the model before its patch or its training, for comparison. Default: what the patch recorded.

    Raises:
        ValueError: the model holds no such layer, or is on the meta device.
    """
    found = layers_of(model)
    record = get_record(model)
    recorded = {} if record is None else record.starts
    starts = recorded if start is None else _starts(start, recorded)
    short = labels(list(found))
    return [_shown(name, short[name], layer, starts.get(name)) for name, layer in found.items()]


def labels(names: Sequence[str]) -> dict[str, str]:
    """Short names: without the parts that are the same in all names, as "0.1" for "stages.0.blocks.1.conv_dw"."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) > 1 or len(parts) == 1:
        return {name: name for name in names}
    differs = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    return {
        name: ".".join(step for step, keep in zip(part, differs, strict=True) if keep)
        for name, part in zip(names, parts, strict=True)
    }


def _starts(model: nn.Module, recorded: Mapping[str, Start]) -> dict[str, Start]:
    """Kernels and quantities of a model, by module name; of plain convolutions, kernels and recorded quantities."""
    plain = {
        name: Start(_kept(one_per_output(module.weight)), recorded[name].quantities if name in recorded else ())
        for name, module in model.named_modules()
        if isinstance(module, PlainConv)
    }
    ours = {
        name: Start(_kept(layer.shown_kernels().values), tuple(map(_kept_quantity, layer.shown_quantities())))
        for name, layer in outermost_layers(model).items()
    }
    return plain | ours


def _shown(name: str, label: str, layer: ConvReplacement, start: Start | None) -> ShownLayer:
    kernels = layer.shown_kernels()
    return ShownLayer(
        name=name,
        label=label,
        summary=layer.summary(),
        kernels=ShownKernels(_plane(kernels.values), kernels.spacing, _kept_elements(kernels.elements)),
        kernel_size=tuple(round(size * kernels.spacing) for size in kernels.values.shape[1:]),
        quantities=tuple(map(_kept_quantity, layer.shown_quantities())),
        highest_frequency=layer.highest_frequency(),
        start=None if start is None else dataclasses.replace(start, kernels=_plane(start.kernels)),
    )


def _plane(kernels: Tensor) -> Tensor:
    """(C, *size) with two spatial dimensions."""
    kernels = _kept(kernels)
    if kernels.ndim == 2:
        return kernels.unsqueeze(1)
    return kernels if kernels.ndim == 3 else kernels[:, kernels.shape[1] // 2]


def _kept_elements(elements: Elements | None) -> Elements | None:
    """Elements in two dimensions; those of 3-D kernels are left out, because they lie off the drawn plane."""
    if elements is None or elements.position.shape[-1] > 2:
        return None
    position, reach = _kept(elements.position), None if elements.reach is None else _kept(elements.reach)
    if position.shape[-1] == 1:
        position = torch.cat((torch.zeros_like(position), position), -1)
        reach = None if reach is None else torch.cat((torch.full_like(reach, 0.5), reach), -1)
    angle, weight = (None if value is None else _kept(value) for value in (elements.angle, elements.weight))
    return dataclasses.replace(elements, position=position, reach=reach, angle=angle, weight=weight)


def _kept_quantity(quantity: Quantity) -> Quantity:
    return dataclasses.replace(quantity, values=_kept(quantity.values))


def _kept(values: Tensor) -> Tensor:
    return values.detach().float().cpu().clone()
