"""A progress bar on standard error, for work that can take seconds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(text: str, total: int, shown: bool | None = None) -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs.

    Args:
        text: what is done.
        total: number of steps.
        shown: whether there is a bar; None: if standard error is a terminal.

    Yields:
        `advance(steps=1, text=None)`: some steps are done; a text replaces the one that is shown.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda steps=1, text=None: None
        return
    from rich.console import Console  # takes a while to import, and most programs show no bar
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total)

        def advance(steps: int = 1, text: str | None = None) -> None:
            bar.update(task, advance=steps, description=text)

        yield advance
