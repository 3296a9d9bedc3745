"""Warm start: new layers that reproduce the kernels of the convolutions that they replace."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..layers import ConvReplacement
from ..layers.replacement import PlainConv

__all__ = ["fit_errors", "warm_start"]


def warm_start(
    groups: Sequence[Sequence[str]],
    convs: Mapping[str, PlainConv],
    layers: Mapping[str, ConvReplacement],
    progress: bool | None = None,
) -> None:
    """Fit layers to the convolutions of the same names, in place.

    Args:
        groups: names; the layers of a group will share the geometry of its first.
        convs: the convolutions that are replaced.
        layers: what stands in for them.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        ValueError: a convolution holds no values.
    """
    columns = (TextColumn("fitting kernels"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task("fit", total=len(convs))
        for group in groups:
            members = [layers[name] for name in group]
            type(members[0]).fit_(members, [convs[name] for name in group])
            bar.advance(task, len(group))


def fit_errors(convs: Mapping[str, PlainConv], layers: Mapping[str, ConvReplacement]) -> dict[str, float]:
    """Relative error of each layer's kernel, by name."""
    return {name: layers[name].fit_error(conv) for name, conv in convs.items()}
