"""Builds the package's C++ with the machine's own compiler, once per machine, and loads it."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from ..record import cache_folder

__all__ = ["library"]

_FOLDER = Path(__file__).parent
_SOURCES = ("direct.cpp", "rows.h", "tiles.h")
# OpenMP resolves to the runtime that PyTorch has loaded already, so the process keeps one pool of threads.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_BUILD_SECONDS = 120
_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The compiled library; None, after one warning, where it cannot be built."""
    with _lock:
        return _library()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "timm_contconv: the compiled depthwise convolution is not available, so large kernels on the CPU "
            "run several times slower with PyTorch's own. It needs a C++17 compiler (set CXX to name one) and a "
            f"writable cache folder (set XDG_CACHE_HOME to name one). Reason: {reason.strip()[-400:]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compiler() -> str:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError("no C++ compiler found: looked for $CXX, c++, g++, clang++")
    return found


def _run(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_BUILD_SECONDS
    ).stdout


def _built() -> Path:
    """Path of the shared library: from the cache, or compiled into it."""
    compiler = _compiler()
    # The predefined macros name the compiler's version and every instruction set that -march=native turned on.
    macros = _run(compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    sources = [(_FOLDER / name).read_text(encoding="utf-8") for name in _SOURCES]
    key = "\0".join((compiler, *_FLAGS, macros, torch.__version__, *sources))
    target = cache_folder() / f"direct-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            _run(compiler, *_FLAGS, str(_FOLDER / _SOURCES[0]), "-o", str(fresh))
            fresh.replace(target)
    return target
