"""Kernels of CC layers that are kept outside training, and how it is seen that they are out of date."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from .cc_paths import Plan

__all__ = ["KeptKernels"]

#: a last layer of so many numbers is compared whole, of a larger one a sample
WHOLE, SAMPLE = 4096, 256


class KeptKernels:
    """Constructed kernels with what they were constructed from.

    A change is seen by the parameters' identity, memory and version, which every change in place increases, but for
    those through `.data`. For these, values are compared too: all of the hidden layers, and of the last layer all or,
    above 4096, some 256 that are evenly spread. That layer is as large as the kernel itself: comparing all of it would
    take a good part of the time of a small convolution. So of a large layer, a change of few numbers through `.data`,
    which PyTorch advises against, can go unseen; one of all numbers, as by an average of weights, can't.

    Args:
        key: what the kernels are for.
        weight: (C_out, C_in/groups, F + 1) last layer.
        hidden: the layers before it.
        kernels: what was constructed from them.
    """

    def __init__(self, key: Hashable, weight: Tensor, hidden: Iterable[Tensor], kernels: Tensor) -> None:
        self.key = key
        self.kernels = kernels.detach()
        #: size of the last image, scale and plan that they were used with
        self.last: tuple[torch.Size, Any, Plan] | None = None
        self._parameters = (weight, *hidden)
        self._pointers = [value.data_ptr() for value in self._parameters]
        self._versions = [_version(value) for value in self._parameters]
        step = 1 if weight.numel() <= WHOLE else weight.numel() // SAMPLE
        # of the parameters' own memory
        self._views = [
            value.detach().flatten()[:: 1 if index else step] for index, value in enumerate(self._parameters)
        ]
        self._values = torch.cat(self._views)

    def is_current(self, weight: Tensor, hidden: Iterable[Tensor]) -> bool:
        """Whether these values are those that the kernels were constructed from."""
        parameters = (weight, *hidden)
        return (
            all(map(operator.is_, parameters, self._parameters))
            and list(map(Tensor.data_ptr, parameters)) == self._pointers
            and list(map(_version, parameters)) == self._versions
            and torch.equal(torch.cat(self._views), self._values)
        )


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version
