"""The measured time of every layer, its share of the model's, and the algorithm that the engine chose for it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement
from ..ops import choices

__all__ = ["LayerTime", "ModelTime", "measure_times"]

WARM_UP, REPEATS = 2, 5  # the engine measures its algorithms in the first run


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """What one layer takes of a forward pass.

    Attributes:
        seconds: median over several passes.
        share: of the model's, 0 to 1.
        output_size: spatial size of the output.
        algorithm: the engine's for this layer; "pytorch" where PyTorch's own convolution runs.
    """

    seconds: float
    share: float
    output_size: tuple[int, ...]
    algorithm: str


@dataclasses.dataclass(frozen=True)
class ModelTime:
    """The time of a forward pass.

    Attributes:
        seconds: median over several passes.
        threads: of PyTorch.
        device: that it ran on.
        input_shape: (N, C, *size).
        layers: by module name.
    """

    seconds: float
    threads: int
    device: str
    input_shape: tuple[int, ...]
    layers: dict[str, LayerTime]


@torch.no_grad()
def measure_times(model: nn.Module, layers: Mapping[str, ConvReplacement], x: Tensor) -> ModelTime:
    """Time a model's forward pass, and those of its layers within it.

    Args:
        model: in eval mode.
        layers: of the model, by name.
        x: one input, (N, C, *size).
    """
    clock = _Clock(x.device)
    watches = {name: _Watch(layer, clock) for name, layer in layers.items()}
    whole = []
    for _ in range(WARM_UP + REPEATS):
        start = clock()
        model(x)
        whole.append(clock() - start)
    for watch in watches.values():
        watch.stop()
    seconds = statistics.median(whole[WARM_UP:])
    times = {name: _layer_time(layers[name], watch, seconds) for name, watch in watches.items() if watch.seconds}
    device = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else x.device.type.upper()
    return ModelTime(seconds, torch.get_num_threads(), device, tuple(x.shape), times)


def _layer_time(layer: ConvReplacement, watch: _Watch, whole: float) -> LayerTime:
    calls = len(watch.seconds) // (WARM_UP + REPEATS)  # a layer may run several times in one pass
    passes = [sum(watch.seconds[i : i + calls]) for i in range(0, len(watch.seconds), calls)]
    seconds = statistics.median(passes[WARM_UP:])
    assert watch.input is not None
    return LayerTime(seconds, seconds / whole, watch.output_size, _algorithm(layer, watch.input, watch.output_size))


def _algorithm(layer: ConvReplacement, x: Tensor, output_size: tuple[int, ...]) -> str:
    """The fastest algorithm that was measured for the layer's convolution."""
    wanted = (x.shape[0], layer.in_channels, layer.out_channels, layer.groups, tuple(layer.stride))
    for choice in choices():
        p = choice.problem
        same = (p.batch, p.in_channels, p.out_channels, p.groups, p.stride) == wanted and p.dtype == x.dtype
        same = same and p.kernel_size == layer.receptive_field() and p.output_size == output_size
        if choice.pass_ == "output" and same and p.device.type == x.device.type:
            return choice.algorithm
    return "pytorch"


class _Clock:
    """Seconds, after all work of the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Watch:
    """Hooks that time every forward pass of a layer, and keep an input of the last one."""

    def __init__(self, layer: nn.Module, clock: Callable[[], float]) -> None:
        self.seconds: list[float] = []
        self.input: Tensor | None = None
        self.output_size: tuple[int, ...] = ()
        self._clock, self._start = clock, 0.0
        self._handles = [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]

    def _begin(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._start = self._clock()

    def _end(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self.seconds.append(self._clock() - self._start)
        self.input, self.output_size = arguments[0][:1], tuple(output.shape[2:])

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
