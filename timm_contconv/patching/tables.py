"""Rich tables as text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

__all__ = ["as_text"]


def as_text(table: RenderableType, width: int = 140) -> str:
    """What a terminal with `width` columns shows."""
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()
