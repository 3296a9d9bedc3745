"""Checks of arguments that layers share with PyTorch's convolutions.

Every check raises an error that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import Tensor, nn

__all__ = [
    "PADDING_MODES",
    "Int",
    "as_int",
    "check_channels",
    "check_choice",
    "check_counts",
    "check_module",
    "check_padding",
    "per_dimension",
]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
LARGEST_SIZE = 1 << 20  # pixels of a kernel, a stride or a padding


def as_int(value: Any) -> int | None:
    """Python's int for an int of any library; None for anything else, also for bools and tensors."""
    if isinstance(value, bool | Tensor):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _as_strict_int(value: Any) -> int:
    number = as_int(value)
    if number is None:
        raise ValueError("expected an int")
    return number


#: a setting that takes an int of any library, and no bool, text or float
Int = Annotated[int, BeforeValidator(_as_strict_int)]


def check_module(model: object) -> None:
    """Check that `model` is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        what = repr(model) if isinstance(model, str | None) else f"a {type(model).__name__}"
        raise TypeError(f"model={what}: expected a module, as timm.create_model returns one")


def check_counts(**counts: int) -> None:
    """Check that all values are positive ints."""
    for name, value in counts.items():
        number = as_int(value)
        if number is None or number < 1:
            raise ValueError(f"{name}={value!r}: expected a positive int")


def check_channels(in_channels: int, out_channels: int, groups: int) -> tuple[int, int, int]:
    """The numbers of channels and groups as Python's ints. `groups` has to divide both numbers of channels."""
    check_counts(in_channels=in_channels, out_channels=out_channels, groups=groups)
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if value % groups:
            raise ValueError(f"{name}={value}: expected a multiple of groups={groups}")
    return operator.index(in_channels), operator.index(out_channels), operator.index(groups)


def per_dimension(name: str, value: int | Sequence[int], ndim: int, minimum: int) -> tuple[int, ...]:
    """An argument of a convolution as one int for each of its spatial dimensions."""
    given = value if isinstance(value, Sequence) else (value,) * ndim
    values = tuple(v for v in map(as_int, given) if v is not None and minimum <= v <= LARGEST_SIZE)
    if not len(values) == len(given) == ndim:
        wanted = "a positive int" if minimum == 1 else f"an int of at least {minimum}"
        raise ValueError(f"{name}={value!r}: expected {wanted}, or {ndim} of them")
    return values


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """Return the value if it is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    return value


def check_padding(padding: int | Sequence[int] | str, ndim: int, padding_mode: str) -> tuple[int, ...] | str:
    """Padding in pixels, one int for each spatial dimension, or "same", or in 1-D "causal"."""
    if not isinstance(padding, str):
        return per_dimension("padding", padding, ndim, minimum=0)
    if padding == "valid":
        return (0,) * ndim
    if padding == "causal" and ndim == 1 and padding_mode != "zeros":
        raise ValueError(f"padding_mode={padding_mode!r}: expected 'zeros'; causal padding allows no other mode")
    if padding == "same" or (padding == "causal" and ndim == 1):
        return padding
    allowed = "'same', 'valid'" + (" or 'causal'" if ndim == 1 else "")
    raise ValueError(f"padding={padding!r}: expected an int, {ndim} ints, {allowed}")
