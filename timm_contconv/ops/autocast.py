"""Autocast rules for the custom operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["register"]

_library = torch.library.Library("timm_contconv", "FRAGMENT")


def register(name: str, operator: Callable[..., Tensor]) -> None:
    """Has an operator cast its floating tensors to autocast's dtype, as PyTorch's convolutions do; float64 stays.

    `torch.library.register_autocast` would fix one dtype for good; here it is the one of the active context.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _rule(device, operator), key)


def _rule(device: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return operator(*(_cast(a, dtype) for a in args))

    return rule


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
