"""Running a script as `python SCRIPT` does, with this package imported."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["run_script"]


def run_script(script: Path, arguments: Sequence[str] = ()) -> int | str | None:
    """Run a script as `python SCRIPT ARGUMENTS` does, in this process, with this package's models registered.

    Args:
        script: a Python file.
        arguments: the script's arguments.

    Returns:
        The script's argument of `sys.exit`; None or 0 for success.
    """
    argv, path = sys.argv, sys.path
    sys.argv = [str(script), *arguments]
    sys.path = [str(script.resolve().parent), *sys.path[1:]]  # as Python does: a script imports files beside it
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        return error.code
    finally:
        sys.argv, sys.path = argv, path
    return None
