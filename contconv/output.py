"""What `contconv` prints, on any terminal, file or pipe."""

from __future__ import annotations

import codecs
import os
import sys
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.protocol import rich_cast
from rich.table import Table

__all__ = ["Output", "console", "errors", "open_closed_streams", "respell"]

#: columns of a file or a pipe, which have no width
WIDTH = 140
#: characters that we print, for encodings without them
SPELLINGS = {"×": "x", "…": "."}


class Output(Console):
    """Standard output. Where a table is wider than a terminal can show, its rows are printed as lists of values."""

    def __init__(self) -> None:
        super().__init__(width=None if sys.stdout is not None and sys.stdout.isatty() else WIDTH)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's function of that name.

        Raises:
            SystemExit: standard output can't be written; the message says why.
        """
        try:
            super().print(*(self._fitting(item) for item in map(rich_cast, objects)), **options)
        except OSError as error:
            _discard_output()
            raise SystemExit(f"standard output can't be written: {error.strerror}") from None

    def _fitting(self, item: Any) -> Any:
        if not isinstance(item, Table):
            return item
        needed = Measurement.get(self, self.options.update_width(10 * WIDTH), item).minimum
        return item if needed <= self.width else _as_lists(item)


console = Output()
#: standard error
errors = Console(stderr=True)


def open_closed_streams() -> None:
    """Give the numbers of closed standard streams to the null device.

    Otherwise a file that is opened later gets such a number, and what is printed is written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def respell() -> None:
    """Let standard output and error replace the characters that their encoding has not."""
    codecs.register_error("contconv", _spell)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="contconv")


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and (text := SPELLINGS.get(error.object[error.start])):
        return text, error.start + 1
    return codecs.backslashreplace_errors(error)


def _discard_output() -> None:
    """Send what is left in the buffer to the null device, so that Python's exit does not fail at it once more."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _as_lists(table: Table) -> str:
    """A table's rows and its footer as blocks of lines "header: value"."""
    headers = [column.header for column in table.columns]
    rows = [*zip(*(column.cells for column in table.columns), strict=True)]
    if table.show_footer:
        rows.append(tuple(column.footer for column in table.columns))
    blocks = ["\n".join(f"{head}: {cell}" for head, cell in zip(headers, row, strict=True) if cell) for row in rows]
    return "\n\n".join(str(part) for part in (table.title, *blocks, table.caption) if part)
