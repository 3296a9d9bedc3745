"""Autocast rules for the custom operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "has_autocast", "register"]

_library = torch.library.Library("timm_contconv", "FRAGMENT")


@torch.compiler.assume_constant_result  # torch.compile before torch 2.13 can't trace PyTorch's function
def has_autocast(device_type: str) -> bool:
    """Whether there is autocast on a type of device; there is none on the meta device."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator gets x."""
    if not torch._C._is_any_autocast_enabled():
        return x.dtype
    device = x.device.type
    if _is_castable(x) and has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def register(name: str, operator: Callable[..., Tensor]) -> None:
    """Has an operator cast its floating tensors to autocast's dtype, as PyTorch's convolutions do; float64 stays.

    `torch.library.register_autocast` would fix one dtype for good; here it is the one of the active context.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def rule(*args: Any, device: str = device) -> Tensor:
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return operator(*(a.to(dtype) if isinstance(a, Tensor) and _is_castable(a) else a for a in args))

        _library.impl(name, rule, key)


def _is_castable(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64
