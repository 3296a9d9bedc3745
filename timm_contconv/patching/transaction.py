"""Transaction: changes of a model's modules that are all made, or none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Transaction"]

_ABSENT = object()


class Transaction:
    """A list of assignments. `apply` makes all of them, or leaves the model as it was.

    Modules keep children and attributes in dicts, so each assignment sets or removes an item of a dict.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        """Set a child or an attribute of a module."""
        if isinstance(value, nn.Module):
            self._remove_from(owner.__dict__, name)
            self._changes.append((owner._modules, name, value))
        else:
            self._remove_from(owner._modules, name)
            self._changes.append((owner.__dict__, name, value))

    def remove(self, owner: nn.Module, name: str) -> None:
        """Remove a child or an attribute of a module, if it is there."""
        self._remove_from(owner._modules, name)
        self._remove_from(owner.__dict__, name)

    def replace(self, model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
        """Replace modules wherever the model holds them.

        Args:
            model: the model.
            replacements: the new modules, by `id` of the old module.
        """
        for parent in model.modules():
            for name, child in parent._modules.items():
                if id(child) in replacements:
                    self._changes.append((parent._modules, name, replacements[id(child)]))

    def _remove_from(self, table: dict[str, Any], name: str) -> None:
        if name in table:
            self._changes.append((table, name, _ABSENT))

    def apply(self) -> None:
        """Make all changes. Ctrl-C waits until they are made, and then undoes them.

        Raises:
            BaseException: what went wrong; nothing is changed then.
        """
        tables = {id(table): table for table, _, _ in self._changes}
        before = {key: dict(table) for key, table in tables.items()}
        try:
            with _interrupts_held_back():
                for table, name, value in self._changes:
                    if value is _ABSENT:
                        table.pop(name, None)
                    else:
                        table[name] = value
        except BaseException:
            for key, table in tables.items():
                _restore(table, before[key])
            raise


def _restore(table: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Give a dict its old items in their old order. An item is missing only for a moment."""
    if table.keys() == before.keys():
        table.update(before)
        return
    for name in table.keys() - before.keys():
        del table[name]
    for name, value in before.items():
        table.pop(name, None)
        table[name] = value


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Only the main thread receives it."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[Any] = []
    try:
        signal.signal(signal.SIGINT, lambda *event: received.append(event))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        signal.raise_signal(signal.SIGINT)
