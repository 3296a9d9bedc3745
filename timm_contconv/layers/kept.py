"""Kernels that are kept outside training, and where values can be looked at to tell whether they still hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.plain import is_transformed

__all__ = ["KeptKernel", "any_requires_grad", "may_keep", "may_look", "to_be_kept"]


@dataclass(frozen=True)
class KeptKernel:
    """A constructed kernel with copies of what it was constructed from.

    Values are compared, not version counters: edits through `.data`, views and communication buffers change a
    parameter without changing its version. An edit of the kernel itself, through `layer.weight`, shows in its own.
    """

    inputs: dict[str, Tensor]
    kernel: Tensor
    version: int

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], kernel: Tensor) -> KeptKernel:
        copies = {name: value.detach().clone() for name, value in inputs.items()}
        return cls(copies, kernel.detach(), kernel._version)

    def is_current(self, inputs: Mapping[str, Tensor]) -> bool:
        return self.kernel._version == self.version and all(
            value.dtype == self.inputs[name].dtype
            and value.device == self.inputs[name].device
            and torch.equal(value, self.inputs[name])
            for name, value in inputs.items()
        )


@contextmanager
def to_be_kept() -> Iterator[None]:
    """Kernels constructed here serve later calls of all kinds, also those with gradients of the input."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def may_keep(inputs: Iterable[Any]) -> bool:
    """Whether kernels constructed from these may be kept: not where a gradient is wanted."""
    return may_look(inputs) and not (torch.is_grad_enabled() and any_requires_grad(inputs))


def may_look(values: Iterable[Any]) -> bool:
    """Whether values can be looked at here: not where they are traced, transformed or captured, or where none are."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or _is_recorded():
        return False
    is_cuda = False
    for value in values:
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta:  # torch.fx passes proxies
            return False
        is_cuda = is_cuda or value.is_cuda
    return not (is_cuda and torch.cuda.is_current_stream_capturing())


def _is_recorded() -> bool:
    """Whether operators are recorded, or run on fake tensors."""
    modes = torch._C._TorchDispatchModeKey
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY)
    )


def any_requires_grad(inputs: Iterable[Any]) -> bool:
    """Whether a gradient is wanted for one of these tensors."""
    return any(value.requires_grad for value in inputs)
