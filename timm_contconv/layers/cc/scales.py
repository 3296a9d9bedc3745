"""Other scales for the CC layers of a model: for a while, or several averaged (Shocher et al. 2020, section 4)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..core.arguments import check_choice
from .grid import Scale, ratios
from .layer import ContinuousConv2d

__all__ = ["ScaleEnsemble", "cc_scales", "scale_ensemble"]

_LOCK = threading.RLock()

Aggregate = Literal["mean", "median"]
#: scales of the layers by module name, or of all of them in the model's order
Scales = Mapping[str, Scale] | Sequence[Scale]


@contextlib.contextmanager
def cc_scales(model: nn.Module, scales: Scales) -> Iterator[nn.Module]:
    """Give CC layers of a model other scales until the end of the block.

    The scales apply to all threads; blocks of several threads wait for each other. A backward pass through gradient
    checkpoints runs layers again, so it has to be inside the block.

    Args:
        model: a model that holds `ContinuousConv2d` layers.
        scales: {module name: scale}, or one scale for each CC layer in the model's order. A scale is a number, or one
            for rows and one for columns.

    Yields:
        The model.

    Raises:
        ValueError: the model holds no CC layer, a name is not a CC layer's, the number of scales is not that of the
            layers, or a scale is out of range; then nothing is changed.
    """
    wanted = _by_name(model, scales)
    layers = _layers(model)
    with _one_thread_at_a_time():
        before = {name: layers[name].scale for name in wanted}
        try:
            for name, scale in wanted.items():
                layers[name].scale = scale
            yield model
        finally:
            for name, scale in before.items():
                layers[name].scale = scale


class ScaleEnsemble(nn.Module):
    """The mean or the median of a model's outputs over several sequences of scales for its CC layers.

    Args:
        model: a model that holds `ContinuousConv2d` layers; its own scales give the expected output size.
        sequences: at least one sequence of scales, each as for `cc_scales`; {} are the model's own. Along every path
            through the network the product of the scales must be that of the model's own scales, so that sizes agree.
        aggregate: "mean", or "median" of each output value; of an even number, the mean of the middle two.

    Raises:
        ValueError: as `cc_scales`, or another aggregate.
    """

    def __init__(self, model: nn.Module, sequences: Sequence[Scales], aggregate: Aggregate = "mean") -> None:
        super().__init__()
        self.aggregate = check_choice("aggregate", aggregate, get_args(Aggregate))
        if not isinstance(sequences, Sequence) or not sequences:
            raise ValueError(f"sequences={sequences!r}: expected at least one sequence of scales, in a list")
        self.model = model
        self.sequences = tuple(_by_name(model, scales) for scales in sequences)

    def forward(self, x: Tensor) -> Tensor:
        """The mean or the median of the model's outputs for x.

        Raises:
            ValueError: the model is in training mode; or a sequence changes the output size of the last CC layer, or
                gives sizes that do not fit in the network. The message has the sizes of all layers.
        """
        if self.model.training:
            raise ValueError("model: it is in training mode, expected eval(); an ensemble of scales is for inference")
        with _one_thread_at_a_time():
            expected = self._expected_size(x)
            outputs = torch.stack([self._output(x, number, expected) for number in range(len(self.sequences))])
            return outputs.mean(0) if self.aggregate == "mean" else _median(outputs)

    @torch.no_grad()
    def _expected_size(self, x: Tensor) -> tuple[int, ...]:
        """Size of the last CC layer's output with the model's own scales."""
        sizes: list[LayerSizes] = []
        with _recording(self.model, sizes):
            self.model(x[:1])
        if not sizes:
            raise ValueError(f"model: none of its CC layers ran ({', '.join(_layers(self.model))})")
        return sizes[-1].after

    def _output(self, x: Tensor, number: int, expected: tuple[int, ...]) -> Tensor:
        """The model's output with the scales of one sequence."""
        sizes: list[LayerSizes] = []
        try:
            with cc_scales(self.model, self.sequences[number]), _recording(self.model, sizes):
                y = self.model(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"sequences[{number}]: its sizes do not fit the rest of the network ({error}):\n{_table(sizes)}"
            ) from error
        if sizes[-1].after != expected:
            raise ValueError(
                f"sequences[{number}]: the last CC layer's output has {_pixels(sizes[-1].after)} pixels, expected"
                f" {_pixels(expected)} as with the model's own scales; the product of a sequence's scales has to be"
                f" theirs:\n{_table(sizes)}"
            )
        if not isinstance(y, Tensor):
            raise ValueError(f"model: its output is a {type(y).__name__}, expected a tensor")
        return y


def scale_ensemble(model: nn.Module, sequences: Sequence[Scales], aggregate: Aggregate = "mean") -> ScaleEnsemble:
    """A `ScaleEnsemble` of a model: the mean or the median of its outputs over several sequences of scales."""
    return ScaleEnsemble(model, sequences, aggregate)


def _median(outputs: Tensor) -> Tensor:
    """The median over the first dimension."""
    ordered, middle = outputs.sort(0).values, len(outputs) // 2
    return ordered[middle] if len(outputs) % 2 else ordered[middle - 1 : middle + 1].mean(0)


class LayerSizes(NamedTuple):
    """Height and width before and after a CC layer."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@contextlib.contextmanager
def _recording(model: nn.Module, sizes: list[LayerSizes]) -> Iterator[None]:
    """Append the sizes of all CC layers that run, in their order of execution."""

    names: dict[nn.Module, str] = {layer: name for name, layer in _layers(model).items()}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        x = args[0] if args else kwargs["x"]
        sizes.append(LayerSizes(names[layer], tuple(x.shape[-2:]), tuple(y.shape[-2:])))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _one_thread_at_a_time() -> contextlib.AbstractContextManager[Any]:
    """A lock for temporary changes of layers. torch.compile traces in one thread and can't trace a lock."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK


def _layers(model: nn.Module) -> dict[str, ContinuousConv2d]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, ContinuousConv2d)}
    if not found:
        raise ValueError(
            f"model: this {type(model).__name__} holds no ContinuousConv2d; tcc.patch(model, 'cc') adds them"
        )
    return found


def _by_name(model: nn.Module, scales: Scales) -> dict[str, Scale]:
    """Scales by module name, checked."""
    layers = _layers(model)
    if isinstance(scales, Mapping):
        by_name = dict(scales)
    elif isinstance(scales, Sequence) and len(scales) == len(layers):
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


def _table(sizes: Sequence[LayerSizes]) -> str:
    return "\n".join(f"  {row.name}: {_pixels(row.before)} -> {_pixels(row.after)}" for row in sizes)


def _pixels(size: Sequence[int]) -> str:
    return "×".join(str(n) for n in size)
