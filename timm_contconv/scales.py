"""Other scales for a trained model's CC layers: for a while, or several averaged (Shocher et al. 2020, section 4)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers.cc import ContinuousConv2d
from .layers.cc_grid import Scale, ratios

__all__ = ["ScaleEnsemble", "cc_scales", "scale_ensemble"]

#: scales of the layers by module name, or of all of them in the model's order
Scales = Mapping[str, Scale] | Sequence[Scale]


@contextlib.contextmanager
def cc_scales(model: nn.Module, scales: Scales) -> Iterator[nn.Module]:
    """Give CC layers of a model other scales, until the block is left.

    Args:
        model: a model that holds `ContinuousConv2d` layers.
        scales: {module name: scale}, or one scale for each CC layer in the model's order. A scale is a number, or one
            for rows and one for columns.

    Yields:
        The model.

    Raises:
        ValueError: the model holds no CC layer, a name is not that of one, the number of scales is not that of the
            layers, or a scale is out of range. Nothing is changed then.
    """
    wanted = _by_name(model, scales)
    layers = _layers(model)
    before = {name: layers[name].scale for name in wanted}
    try:
        for name, scale in wanted.items():
            layers[name].scale = scale
        yield model
    finally:
        for name, scale in before.items():
            layers[name].scale = scale


class ScaleEnsemble(nn.Module):
    """A model applied several times, each with other scales in its CC layers; the outputs are averaged.

    Args:
        model: a model that holds `ContinuousConv2d` layers; its own scales say what product and size is expected.
        sequences: as `cc_scales` takes them, at least one. [{}] are the model's own scales.

    Raises:
        ValueError: as `cc_scales`; the product of a sequence's scales, over all CC layers, is another than that of the
            model's own.
    """

    def __init__(self, model: nn.Module, sequences: Sequence[Scales]) -> None:
        super().__init__()
        if not sequences:
            raise ValueError(f"sequences={sequences!r}: expected at least one sequence of scales")
        self.model = model
        self.sequences = tuple(_by_name(model, scales) for scales in sequences)
        own = _product(model, {})
        for number, scales in enumerate(self.sequences):
            product = _product(model, scales)
            if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(product, own, strict=True)):
                raise ValueError(
                    f"sequences[{number}]: its scales multiply to {product[0]:.6g} × {product[1]:.6g}, the model's own"
                    f" to {own[0]:.6g} × {own[1]:.6g}; expected the same product"
                )

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the model's outputs for x.

        Raises:
            ValueError: the model is in training mode; a sequence gives the last CC layer an output of another size
                than the model's own scales do, or sizes that do not fit together elsewhere in the network. The
                message has the sizes of all layers.
        """
        if self.model.training:
            raise ValueError("model: it is in training mode, expected eval(); an ensemble of scales is for inference")
        expected = self._expected_size(x)
        outputs = []
        for number, scales in enumerate(self.sequences):
            sizes: list[LayerSizes] = []
            try:
                with cc_scales(self.model, scales), _recording(self.model, sizes):
                    outputs.append(self.model(x))
            except RuntimeError as error:
                raise ValueError(
                    f"sequences[{number}]: its sizes do not fit the rest of the network ({error}):\n{_table(sizes)}"
                ) from error
            if sizes[-1].after != expected:
                raise ValueError(
                    f"sequences[{number}]: the last CC layer's output has {_pixels(sizes[-1].after)} pixels, expected"
                    f" {_pixels(expected)} as with the model's own scales:\n{_table(sizes)}"
                )
        return torch.stack(outputs).mean(0)

    @torch.no_grad()
    def _expected_size(self, x: Tensor) -> tuple[int, ...]:
        """Size of the last CC layer's output with the model's own scales."""
        sizes: list[LayerSizes] = []
        with _recording(self.model, sizes):
            self.model(x[:1])
        return sizes[-1].after


def scale_ensemble(model: nn.Module, sequences: Sequence[Scales]) -> ScaleEnsemble:
    """A module that averages a model's outputs over several sequences of scales; `ScaleEnsemble` has the arguments."""
    return ScaleEnsemble(model, sequences)


class LayerSizes(NamedTuple):
    """Height and width before and after a CC layer."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@contextlib.contextmanager
def _recording(model: nn.Module, sizes: list[LayerSizes]) -> Iterator[None]:
    """Append the sizes of all CC layers that run, in the order in which they run."""

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, x, y: sizes.append(LayerSizes(name, tuple(x[0].shape[-2:]), tuple(y.shape[-2:])))

    handles = [layer.register_forward_hook(record(name)) for name, layer in _layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> dict[str, ContinuousConv2d]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, ContinuousConv2d)}
    if not found:
        raise ValueError(
            f"model: this {type(model).__name__} holds no ContinuousConv2d; tcc.patch(model, 'cc') does it"
        )
    return found


def _by_name(model: nn.Module, scales: Scales) -> dict[str, Scale]:
    """Scales by module name, checked."""
    layers = _layers(model)
    if isinstance(scales, Mapping):
        by_name = dict(scales)
    elif len(scales) == len(layers):
        by_name = dict(zip(layers, scales, strict=True))
    else:
        raise ValueError(
            f"scales={scales!r}: expected {len(layers)} of them, one for each CC layer ({', '.join(layers)}), or"
            " {name: scale}"
        )
    for name, scale in by_name.items():
        if name not in layers:
            raise ValueError(f"scales[{name!r}]: no CC layer; there are {', '.join(layers)}")
        ratios(f"scales[{name!r}]", scale)
    return by_name


def _product(model: nn.Module, scales: Mapping[str, Scale]) -> tuple[float, float]:
    """Product of the scales of all CC layers, for rows and columns."""
    all_scales = [ratios("scale", scales.get(name, layer.scale)) for name, layer in _layers(model).items()]
    rows, columns = (math.prod(ratio[dim][0] / ratio[dim][1] for ratio in all_scales) for dim in (0, 1))
    return rows, columns


def _table(sizes: Sequence[LayerSizes]) -> str:
    return "\n".join(f"  {row.name}: {_pixels(row.before)} -> {_pixels(row.after)}" for row in sizes)


def _pixels(size: Sequence[int]) -> str:
    return "×".join(str(n) for n in size)
