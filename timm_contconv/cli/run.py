"""Running a script as `python SCRIPT` does, with this package imported."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["run_script"]


def run_script(script: Path, arguments: Sequence[str] = ()) -> int | str | None:
    """Run a script as `python SCRIPT ARGUMENTS` does, in this process, with this package's models registered.

    Args:
        script: a Python file.
        arguments: the script's arguments.

    Returns:
        The script's argument of `sys.exit`; None or 0 for success.

    Raises:
        SystemExit: the script raised an error, which was printed as Python prints it.
    """
    argv, path = sys.argv, sys.path
    sys.argv = [str(script), *arguments]
    sys.path = [str(script.resolve().parent), *sys.path[1:]]  # as Python does: a script imports files beside it
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        return error.code
    except BaseException as error:
        error.__traceback__ = _frames_of(str(script), error.__traceback__)  # without the frames that ran it
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
    finally:
        sys.argv, sys.path = argv, path
    return None


def _frames_of(script: str, traceback: TracebackType | None) -> TracebackType | None:
    """From the script's first frame on; None where it has none, as for a syntax error."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename != script:
        traceback = traceback.tb_next
    return traceback
