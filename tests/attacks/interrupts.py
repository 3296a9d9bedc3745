"""Interrupts at any call inside the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import timm_contconv

__all__ = ["Interrupted", "interrupted_at"]

PACKAGE = str(Path(timm_contconv.__file__).parent)


class Interrupted(BaseException):
    """As Ctrl-C or a lack of memory may arise anywhere."""


def interrupted_at(number: int | None, call: Callable[[], Any]) -> Any:
    """Run `call`, and raise where the package calls its n-th function; None raises nowhere.

    Returns:
        What `call` returns, if it ends before its n-th call.

    Raises:
        Interrupted: it did not.
    """
    if number is None:
        return call()
    left = number

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if frame.f_code.co_filename.startswith(PACKAGE):
            left -= 1
            if left == 0:
                raise Interrupted

    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(None)
