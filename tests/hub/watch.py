"""Loading a stranger's folder while the interpreter and PyTorch's allocator report what they do."""

import sys
import time
from pathlib import Path

import timm_contconv as tcc

from ..memory import peak_allocation

__all__ = ["WATCH", "load_watched"]

SECONDS = 60  # on a machine that is busy with other things; alone it takes less than one
BYTES = 2**28
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")


class Watch:
    """What the interpreter does while it is entered."""

    def __init__(self):
        self.active, self.opened, self.forbidden = False, [], []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | Path):
            self.opened.append(Path(str(arguments[0])))
        elif event in FORBIDDEN:
            self.forbidden.append((event, str(arguments)))

    def __enter__(self):
        self.active, self.opened, self.forbidden = True, [], []
        return self

    def __exit__(self, *_):
        self.active = False


WATCH = Watch()
ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def load_watched(load, path):
    """Load, and tell the error; nothing outside of the folder and the installation was touched, no memory filled."""
    errors = []

    def attempt():
        with WATCH:
            try:
                load(path)
            except ERRORS as error:
                errors.append(error)

    start = time.perf_counter()
    assert peak_allocation(attempt) < BYTES
    assert time.perf_counter() - start < SECONDS
    installed = (sys.prefix, sys.base_prefix, str(Path(tcc.__file__).parent.parent), "/proc", "/sys", "/dev", "/usr")
    outside = [p for p in WATCH.opened if p.is_absolute() and not str(p).startswith((str(path), *installed))]
    assert outside == []
    assert WATCH.forbidden == []
    return errors[0] if errors else None
