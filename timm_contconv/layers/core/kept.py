"""A value that is computed from parameters outside training. The CPU keeps it while the parameters stay equal."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...ops import plain_only

__all__ = ["Kept", "may_look"]

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The last computed value, with copies of the parameters that it was computed from.

    Parameters are compared by value, because edits through `.data`, views and communication buffers leave no other
    trace. On the CPU this takes microseconds. On an accelerator it would wait for the device, so nothing is kept there.
    Several threads may use one object: each reads the entry once, and replaces it as a whole. The value is shared, so
    a caller that passes it on to users has to copy it.
    """

    def __init__(self) -> None:
        self._entry: tuple[Hashable, Sequence[Tensor], Value] | None = None  # key, copies of inputs, value

    def get(self, inputs: Sequence[Tensor], compute: Callable[[], Value], key: Hashable = None) -> Value:
        """The kept value if inputs and key are those it was computed from; otherwise a new one, kept where allowed.

        Args:
            inputs: the parameters that the value is a function of.
            compute: computes the value.
            key: anything else that the value depends on.
        """
        if not _may_keep(inputs):
            return compute()
        entry = self._entry
        if entry is None or entry[0] != key or not _are_equal(entry[1], inputs):
            with torch.inference_mode(False), torch.no_grad():  # later calls may need the input's gradient
                # copies first: if another thread changes a parameter meanwhile, the next call computes again
                copies = [tensor.detach().clone() for tensor in inputs]
                self._entry = entry = (key, copies, compute())
        return entry[2]

    def drop(self) -> None:
        """Free the memory of the kept value."""
        self._entry = None

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are empty
        return Kept, ()


def _are_equal(then: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(then) == len(now) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(then, now, strict=True)
    )


def _may_keep(inputs: Sequence[Tensor]) -> bool:
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        return False
    return all(value.device.type == "cpu" for value in inputs) and may_look(inputs)


def may_look(values: Iterable[Any]) -> bool:
    """Whether values can be read here: not on the meta device, nor while they are traced, transformed or captured."""
    if torch.compiler.is_compiling() or plain_only() or _is_recorded():
        return False
    is_cuda = False
    for value in values:
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta:
            return False
        is_cuda = is_cuda or value.is_cuda
    return not (is_cuda and torch.cuda.is_current_stream_capturing())


def _is_recorded() -> bool:
    """Whether operators are traced, or run on fake tensors."""
    modes = torch._C._TorchDispatchModeKey
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY)
    )
