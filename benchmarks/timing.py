"""Timing that survives a noisy machine: contenders take turns, medians are compared."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.progress import track

__all__ = ["alternating_medians", "machine"]


def alternating_medians(
    calls: Mapping[str, Callable[[], object]], repeats: int, description: str = "measuring"
) -> dict[str, float]:
    """Median seconds of each call over `repeats` rounds, in each of which every call runs once; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in track(range(repeats + 1), description=description, transient=True):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{torch.get_num_threads()} threads of {processor}, {gpu}, torch {torch.__version__}"
