"""kill -9 while a model is saved over another."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import timm_contconv as tcc

from ..hub.helpers import small

__all__ = ["attack"]


def attack(count: int, seed: int = 0) -> Counter[str]:
    """Kill so many processes while they save, and look at what stands.

    Every second one is killed at any time, the others within a hundredth of a second after the card was begun: it is
    the last file, and then the new folder takes the place of the old one.

    Returns:
        How often the old model stood under its name, or the new one, or the old one was restored from beside it.

    Raises:
        AssertionError: no whole model stands, or the next save leaves files beside it.
    """
    chance, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        old = tcc.save_pretrained(small(seed=0), folder)
        for number in range(count):
            new = small(seed=number + 1)
            process = _saving(new, folder)
            if number % 2:
                time.sleep(chance.uniform(0, 1.5))
            else:
                _wait_for_card(folder, process)
                time.sleep(chance.uniform(0, 0.01))
            _kill(process)
            where = "under its name" if folder.is_dir() else "restored from beside it"
            stands = tcc.from_pretrained(folder)
            which = "new" if _equal(stands, new) else "old" if _equal(stands, small(seed=number)) else None
            assert which, f"kill {number}: neither the old nor the new model stands"
            found[f"the {which} model, {where}"] += 1
            tcc.save_pretrained(new, folder)
            assert [path.name for path in folder.parent.iterdir()] == [old.name]
    return found


def _saving(model: torch.nn.Module, folder: Path) -> int:
    process = os.fork()
    if process == 0:
        try:
            tcc.save_pretrained(model, folder)
        finally:
            os._exit(0)
    return process


def _wait_for_card(folder: Path, process: int) -> None:
    while not _is_ended(process) and not [*folder.parent.glob(".model.saving-*/new/README.md")]:
        time.sleep(0.0002)


def _is_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)  # of a process that has ended too: it is not waited for yet
    os.waitpid(process, 0)


def _equal(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
