"""`contconv tune`: measures the convolutions of a model ahead, and prints what was chosen and gained."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from .. import ops

__all__ = ["step_of", "tune"]

ROUNDS = 3  # of the whole model, after one to warm up; the median counts


def step_of(model: nn.Module, images: Tensor, amp: bool, train: bool) -> Callable[[], None]:
    """A call of the model: forward and backward for training, else forward only; in bfloat16 with `amp`."""
    device = images.device.type
    context = torch.autocast(device, torch.bfloat16) if amp else contextlib.nullcontext()
    model.train(train)

    def step() -> None:
        with torch.set_grad_enabled(train), context:
            out = model(images)
        if train:
            out.float().square().mean().backward()
            model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def tune(step: Callable[[], None], console: Console, title: str) -> Table:
    """Measure all that the engine computes in a step, with a progress bar.

    Returns:
        One row per kind of convolution and pass: how often it runs, the algorithm, its time, how many times as long
        PyTorch's own takes, and its part of the step's time. The longest come first.
    """
    calls = ops.calls_of(step)
    bar = track(calls, description="measuring", console=console, transient=True)
    with ops.measuring(True):
        found = [ops.tune(*call) for call in bar]
        seconds = _median(step)
    choices = [choice for choice in found if choice is not None]
    return _table(calls, choices, seconds, title)


def _median(step: Callable[[], None]) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _table(calls: Counter[ops.Call], choices: Sequence[ops.Choice], seconds: float, title: str) -> Table:
    counted = [(calls[c.pass_, c.problem], c) for c in choices]
    times = [count * c.seconds[c.algorithm] for count, c in counted]
    spared = sum(t * (c.gain - 1) for t, c in zip(times, choices, strict=True) if c.gain > 1)
    table = Table(title=title, show_footer=True)
    total = f"{1000 * seconds:.1f} ms"
    table.add_column("problem", footer="the whole model")
    table.add_column("pass")
    table.add_column("calls", justify="right")
    table.add_column("algorithm")
    table.add_column("time", justify="right", footer=total)
    table.add_column("gain", justify="right", footer=f"{(seconds + spared) / seconds:.2f}×")
    table.add_column("part", justify="right", footer=f"{sum(times) / seconds:.1%}")
    for part, (count, choice) in sorted(zip(times, counted, strict=True), key=lambda row: -row[0]):
        table.add_row(
            str(choice.problem),
            choice.pass_,
            str(count),
            choice.algorithm,
            f"{1000 * choice.seconds[choice.algorithm]:.3f} ms",
            f"{choice.gain:.2f}×",
            f"{part / seconds:.1%}",
        )
    small = sum(calls.values()) - sum(count for count, _ in counted)
    table.caption = "gain: how many times as long PyTorch's own convolution takes"
    if small:
        table.caption += f"; {small} calls are too small for a choice to pay"
    return table
