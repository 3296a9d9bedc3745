"""What layers with a common geometry compute once per forward of the module that holds them.

Under torch.compile the compiler finds the common computation itself; this is for eager training. The module's
forward pre-hook computes the interpolation, its layers take it, and it is kept until the next forward, because
gradient checkpointing runs layers again during the backward and must meet the same tensors.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import ConstructedConv

__all__ = ["compute_once", "compute_separately", "interpolation_of"]


@dataclasses.dataclass
class _Interpolation:
    """What was computed from a geometry, and from which state of it."""

    values: dict[str, Tensor]
    state: tuple[tuple[int, int], ...]
    thread: int
    running: bool = True


# beside the modules, not on them: tensors with a graph can't be copied or pickled
_KEPT: WeakKeyDictionary[nn.Module, _Interpolation] = WeakKeyDictionary()


def compute_once(home: nn.Module) -> None:
    """Let layers inside of `home` that share a geometry share what they compute from it."""
    if _begin not in home._forward_pre_hooks.values():
        home.register_forward_pre_hook(_begin)
        home.register_forward_hook(_end, always_call=True)


def compute_separately(home: nn.Module) -> None:
    """Undo `compute_once`."""
    for hooks, own in ((home._forward_pre_hooks, _begin), (home._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            home._forward_hooks_always_called.pop(key, None)


def interpolation_of(layer: ConstructedConv) -> dict[str, Tensor] | None:
    """What was computed for this forward from the layer's geometry, or None where it is on its own."""
    if torch.compiler.is_compiling():
        return None
    kept = _KEPT.get(layer.geometry)
    if kept is None or kept.state != _state(layer.geometry):
        return None
    is_own = kept.running and kept.thread == threading.get_ident()
    if not torch.is_grad_enabled():
        if is_own:  # a reentrant checkpoint, which will run the layer again, in a backward of its own
            del _KEPT[layer.geometry]
        return None
    return kept.values if is_own or torch._C._current_graph_task_id() != -1 else None


def _begin(home: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _is_sharded(home):
        return
    for layer in _first_layers(home):
        values = layer.interpolate()
        if values is not None:
            _KEPT[layer.geometry] = _Interpolation(values, _state(layer.geometry), threading.get_ident())


def _end(home: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for layer in _first_layers(home):
        kept = _KEPT.get(layer.geometry)
        if kept is not None and kept.thread == threading.get_ident():
            kept.running = False


def _first_layers(home: nn.Module) -> Iterator[ConstructedConv]:
    """One layer in training for each geometry that `home` holds for several."""
    from .base import ConstructedConv

    held = {id(child) for child in home._modules.values()}
    for module in home.modules():
        if isinstance(module, ConstructedConv) and module.training and id(module.geometry) in held:
            held.remove(id(module.geometry))
            yield module


def _state(geometry: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((id(parameter), parameter._version) for parameter in geometry.parameters())


def _is_sharded(home: nn.Module) -> bool:
    """Whether FSDP2 gathers this module's parameters anew in the backward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # costly to import, and imported where it is in use
    return fsdp is not None and isinstance(home, fsdp.FSDPModule)
