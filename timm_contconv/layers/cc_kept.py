"""Kernels of CC layers that are kept outside training, and how it is seen that they are out of date."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from .cc_paths import Plan

__all__ = ["KeptKernels"]

#: by their bytes
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class KeptKernels:
    """Constructed kernels with what they were constructed from.

    All values are compared, as edits through `.data`, views and communication buffers leave no other trace; an edit
    of the kernels themselves shows in their version. The last layer is as large as the kernels, so it is compared in
    the widest words that it divides into, which takes half the time.

    Args:
        key: what the kernels are for.
        weight: (C_out, C_in/groups, F + 1) last layer.
        hidden: the layers before it.
        kernels: what was constructed from them.
    """

    def __init__(self, key: Hashable, weight: Tensor, hidden: Iterable[Tensor], kernels: Tensor) -> None:
        self.key = key
        self.kernels = kernels.detach()
        #: size of the last image, settings of the layer and plan that they were used with
        self.last: tuple[torch.Size, Any, Plan] | None = None
        self._version = self.kernels._version
        self._parameters = (weight, *hidden)
        self._pointers = [value.data_ptr() for value in self._parameters]
        self._is_contiguous = all(value.is_contiguous() for value in self._parameters)
        # of the parameters' own memory where that is contiguous
        self._words = [_words(value) for value in self._parameters]
        self._values = [words.clone() for words in self._words]

    def is_current(self, weight: Tensor, hidden: Iterable[Tensor]) -> bool:
        """Whether these values are those that the kernels were constructed from."""
        parameters = (weight, *hidden)
        if self.kernels._version != self._version or not all(map(operator.is_, parameters, self._parameters)):
            return False
        if list(map(Tensor.data_ptr, parameters)) != self._pointers:
            return False
        if not self._is_contiguous:  # then these are copies
            self._words = [_words(value) for value in parameters]
        return all(map(torch.equal, self._words, self._values))


def _words(value: Tensor) -> Tensor:
    """All bits of a tensor as the widest integers that they divide into."""
    flat = value.detach().flatten()
    own, start = flat.element_size(), flat.storage_offset() * flat.element_size()
    return flat.view(next(WORDS[size] for size in WORDS if size == own or flat.nbytes % size == start % size == 0))
