"""Builds the package's C++ with the machine's own compiler, once per machine, and loads it."""

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from ..record import cache_folder, cpu_features

__all__ = ["compiler", "library", "library_origin", "load"]

_FOLDER = Path(__file__).parent
_SOURCES = ("direct.cpp", "rows.h", "tiles.h")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
# The first that a compiler takes. OpenMP resolves to the runtime that PyTorch has loaded already, so the process keeps
# one pool of threads; Apple's clang has none, and the loops then run in one thread. Old clang lacks -march=native.
_OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ())
_BUILD_SECONDS = 120
_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The compiled library; None, after one warning, where there is none and it can't be built."""
    with _lock:
        return _library()[0]


def library_origin() -> str:
    """The path of the compiled library, or why there is none."""
    with _lock:
        return _library()[1]


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str]:
    try:
        loaded = load(cache_folder())
        return loaded, loaded._name
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()[-400:]
    warnings.warn(
        "timm_contconv: the compiled depthwise convolution is not available, so training with large kernels on the CPU "
        "takes 10 to 30 % longer; inference takes hardly longer. It needs a C++17 compiler (set CXX to name one) and a "
        f"cache folder of your own (set TIMM_CONTCONV_CACHE to name one). Reason: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, f"none: {reason}"


def _key() -> str:
    """What the library depends on. Not on the compiler: a library that is built is used where no compiler is."""
    sources = [(_FOLDER / name).read_text(encoding="utf-8") for name in _SOURCES]
    text = "\0".join((torch.__version__, cpu_features(), *_FLAGS, *sources))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def load(folder: Path) -> ctypes.CDLL:
    """The library in a folder, built into it where it is missing or does not load.

    While one process builds, others wait.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: there is no library, and none could be built.
    """
    path = folder / f"direct-{_key()}.so"
    if path.exists():
        _require_private(folder, path)
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_private(folder)
    with FileLock(path.with_suffix(".lock"), timeout=_BUILD_SECONDS):
        if not path.exists():  # no other process has built it meanwhile
            _build(path)
    _require_private(path)
    return ctypes.CDLL(str(path))


def _require_private(*paths: Path) -> None:
    """Check that no other user can have put code into a file, or can put files into a folder.

    Raises:
        PermissionError: it belongs to another user (not to root), or others may write to it.
    """
    if os.name != "posix":
        return
    for path in paths:
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise PermissionError(
                f"{path}: other users can change it, so no code in it is run; take their rights away (chmod go-w), or "
                "set TIMM_CONTCONV_CACHE to a folder that only you can write to"
            )


def _build(path: Path) -> None:
    command = compiler()
    if sys.stderr is not None:
        print(f"timm_contconv: compiling {path} once (about 10 s)...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        _compile(command, fresh)
        fresh.chmod(0o700)
        fresh.replace(path)


def compiler() -> list[str]:
    """The command of the compiler, with the arguments that CXX gives it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: CXX has a quotation without an end.
    """
    named = os.environ.get("CXX", "")
    if command := shlex.split(named):
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(f"CXX={named!r}: there is no program {command[0]!r}; name a compiler, or unset CXX")
        return command
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise FileNotFoundError("no C++ compiler found: looked for c++, g++ and clang++; CXX is not set")
    return [found]


def _compile(command: list[str], target: Path) -> None:
    """Compile with the first of the optional flags that work.

    Raises:
        subprocess.CalledProcessError: none works; its stderr is that of the fewest flags.
    """
    for optional in _OPTIONAL_FLAGS:
        arguments = (*command, *_FLAGS, *optional, str(_FOLDER / _SOURCES[0]), "-o", str(target))
        result = subprocess.run(
            arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_BUILD_SECONDS, check=False
        )
        if result.returncode == 0:
            return
    result.check_returncode()
