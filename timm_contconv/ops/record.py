"""What was measured: in memory, and in a small JSON file per machine."""

import contextlib
import hashlib
import json
import math
import os
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .problem import Problem

__all__ = ["Record", "cache_folder", "cpu_features", "cpu_name", "record_of", "records"]

# Raised whenever an algorithm changes its speed.
_ENGINE = 1
# As many sizes of images are measured for one layer in one process; others use what was measured for the nearest.
_MOST_SIZES = 8


def cache_folder() -> Path:
    """Where this package keeps what it can make again: $TIMM_CONTCONV_CACHE, or a folder in $XDG_CACHE_HOME.

    Raises:
        FileNotFoundError: neither is set, and the user has no home folder.
    """
    if own := os.environ.get("TIMM_CONTCONV_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm_contconv"
    except RuntimeError:  # neither HOME nor an entry in the password file
        raise FileNotFoundError("there is no home folder; set TIMM_CONTCONV_CACHE to a folder of your own") from None


class Record:
    """Seconds that algorithms took for passes of problems, on one device with one number of threads."""

    def __init__(self, fingerprint: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        #: The file; None where there is no folder for it.
        self.path: Path | None = None
        self.fingerprint = fingerprint
        #: Seconds by algorithm, of every pass of a problem that this process has met.
        self.met: dict[tuple[str, Problem], dict[str, float]] = {}
        #: Algorithms that raised or were wrong here, and how.
        self.dropped: dict[str, str] = {}
        self._stored: dict[str, dict[str, float]] = {}
        self._warned = False
        try:
            self.path = cache_folder() / f"measured-{key}.json"
            self._read(self.path)
        except FileNotFoundError as error:
            self._warn(f"measurements are not kept for the next process ({error})")
        except (OSError, ValueError) as error:
            self._warn(f"{self.path}: not a record of measurements on this machine, so it is ignored ({error})")

    def find(self, pass_: str, problem: Problem, names: Collection[str]) -> dict[str, float] | None:
        """Seconds by algorithm, of all these at least; None where one of them still has to be measured.

        Of images whose size changes all the time, only the first few sizes are measured. For other sizes these are the
        seconds of the nearest measured one, in proportion.
        """
        times = self.met.get((pass_, problem)) or self._stored.get(_key(pass_, problem))
        if times is not None and times.keys() >= set(names):
            self.met[pass_, problem] = times
            return times
        relatives = {
            p: t
            for (q, p), t in self.met.items()
            if q == pass_ and _layer(p) == _layer(problem) and t.keys() >= set(names)
        }
        if len(relatives) < _MOST_SIZES:
            return None
        nearest = min(relatives, key=lambda p: abs(math.log(problem.macs / p.macs)))
        return {name: t * problem.macs / nearest.macs for name, t in relatives[nearest].items()}

    def add(self, pass_: str, problem: Problem, times: dict[str, float], dropped: dict[str, str]) -> None:
        """Remembers what was measured, and writes it to the file."""
        self.met[pass_, problem] = times
        self._stored[_key(pass_, problem)] = times
        for name in dropped.keys() - self.dropped.keys():
            way_out = "" if self.path is None else f" Delete {self.path} to have it tried again."
            warnings.warn(
                f"timm_contconv: the algorithm {name!r} is not used on this machine any more, because in the {pass_} "
                f"pass of {problem} it {dropped[name]}.{way_out}",
                RuntimeWarning,
                stacklevel=2,
            )
        self.dropped = {**dropped, **self.dropped}
        try:
            if self.path is not None:
                self._write(self.path)
        except OSError as error:
            self._warn(f"{self.path}: measurements are not kept for the next process ({error})")

    def winners(self) -> Counter[str]:
        """For how many of the measured passes each algorithm is the fastest."""
        return Counter(min(times, key=times.__getitem__) for times in self._stored.values() if times)

    def _read(self, path: Path) -> None:
        """Adds what stands in the file, if there is one."""
        if not path.exists():
            return
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.get("fingerprint") != self.fingerprint:
            raise ValueError("it holds those of another machine")
        seconds, dropped = raw.get("seconds"), raw.get("dropped")
        if not (isinstance(seconds, dict) and all(map(_is_seconds, seconds.values()))):
            raise ValueError("its times are not seconds by algorithm")
        if not (isinstance(dropped, dict) and all(isinstance(reason, str) for reason in dropped.values())):
            raise ValueError("its reasons are not text by algorithm")
        self._stored = {**seconds, **self._stored}
        self.dropped = {**dropped, **self.dropped}

    def _write(self, path: Path) -> None:
        """Adds to what other processes have written in the meantime; readers see the old file or the new one."""
        with contextlib.suppress(ValueError):  # a damaged file: it was said when it was read first
            self._read(path)
        content = {"fingerprint": self.fingerprint, "dropped": self.dropped, "seconds": self._stored}
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            fresh.write_text(json.dumps(content, indent=1), encoding="utf-8")
            fresh.replace(path)

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(f"timm_contconv: {message}", RuntimeWarning, stacklevel=2)
        self._warned = True


def _is_seconds(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(t, float) and t > 0 for t in row.values())


def _key(pass_: str, problem: Problem) -> str:
    return f"{pass_}: {problem}"


def _layer(problem: Problem) -> Problem:
    """What problems of one layer share, whatever the images."""
    return problem._replace(batch=1, input_size=())


_records: dict[tuple[str, int], Record] = {}


def records() -> list[Record]:
    """The records that this process has used."""
    return list(_records.values())


def record_of(device: torch.device) -> Record:
    """The record of a device, for the number of threads in use."""
    key = (str(device), torch.get_num_threads())
    if key not in _records:
        _records[key] = Record(_fingerprint(*key))
    return _records[key]


def _fingerprint(device: str, threads: int) -> dict[str, Any]:
    shared = {"engine": _ENGINE, "torch": torch.__version__}
    if device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        cpu = {"device": cpu_name(), "capability": capability, "cores": os.cpu_count(), "threads": threads}
        return {**shared, **cpu}
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {**shared, "device": name, "cudnn": torch.backends.cudnn.version()}


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The name of the CPU, as the system gives it."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def cpu_features() -> str:
    """The instruction sets of the CPU; its name where the system does not list them."""
    return _cpu_info("flags") or _cpu_info("Features") or f"{platform.machine()} {cpu_name()}"


def _cpu_info(key: str) -> str:
    """A value of Linux's list of CPUs, of the first CPU that has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
