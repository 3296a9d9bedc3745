"""Rich tables, and as text. Rich takes a while to import, and is needed where something is printed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["as_text", "new_table"]


def new_table(*columns: str, **settings: Any) -> Table:
    """An empty table; settings as for `rich.table.Table`."""
    from rich.table import Table

    return Table(*columns, **settings)


def as_text(table: RenderableType, width: int = 140) -> str:
    """What a terminal with `width` columns shows."""
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()
