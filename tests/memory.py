"""How much memory a function needs, by what PyTorch's allocator hands out."""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def peak_allocation(function: Callable[[], object]) -> int:
    """The largest sum of bytes that PyTorch holds at once while function runs, beyond what it held before.

    The resident memory of the process says less: the allocator reuses what earlier tests gave back.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in changes), initial=0))
