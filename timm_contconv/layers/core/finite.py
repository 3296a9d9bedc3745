"""Parameters that are no longer numbers are refused where they would be used."""

from __future__ import annotations

import math

from torch import Tensor

from .kept import may_look

__all__ = ["require_finite"]


def require_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity on the CPU; an accelerator would have to be waited for.

    Raises:
        ValueError: names the parameter, and how many of its values are not finite.
    """
    if value.device.type != "cpu" or not may_look((value,)):
        return
    if math.isfinite(value.detach().sum().item()):  # takes a quarter of the time; may overflow
        return
    if wrong := int((~value.detach().isfinite()).sum()):
        raise ValueError(
            f"{name}: {wrong} of {value.numel()} values are NaN or infinite, expected finite numbers; go back to an"
            " earlier checkpoint, and train with gradient clipping or a lower learning rate"
        )
