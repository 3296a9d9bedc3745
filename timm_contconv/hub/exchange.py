"""Replace a folder as a whole.

The new files are written beside the folder, in `.NAME.saving-XXXX/new`. The old folder is then moved to
`.NAME.saving-XXXX/old`, and `new` takes its place. At every moment the folder is whole under its name, or `old` is
whole and `restore` finds it. A lock tells the leftovers of a process that was killed from the files of one that runs.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["made_folder", "replaced", "restore"]

LOCK, NEW, OLD, REMOVED = "lock", "new", "old", "removed"


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents. Those made here that are still empty at the end of the block are removed."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Give an empty folder, which takes the place of `folder` when the block ends without an error.

    Leftovers of killed processes are removed.

    Args:
        folder: absolute, without symbolic links; its parent is made if need be.

    Raises:
        OSError: the folder can not be replaced; the old one stands, or the error says where it is.
    """
    with made_folder(folder.parent):
        restore(folder)
        for place in _places(folder):
            if not _in_use(place):
                _remove(place)
        place = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
        try:
            with FileLock(place / LOCK):
                (place / NEW).mkdir()
                yield place / NEW
                _exchange(folder, place)
        finally:
            restore(folder)
            if not _is_interrupted(place):
                _remove(place)


def restore(folder: Path) -> None:
    """Put the old folder back where a process was killed between the two moves."""
    for place in _places(folder):
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if free and _is_interrupted(place) and not _in_use(place):
            if folder.exists():
                folder.rmdir()
            (place / OLD).rename(folder)


def _exchange(folder: Path, place: Path) -> None:
    if folder.exists():
        folder.rename(place / OLD)
    try:
        (place / NEW).rename(folder)
    except OSError as error:
        raise OSError(f"{folder}: something else was put there meanwhile; the old folder is {place / OLD}") from error


def _is_interrupted(place: Path) -> bool:
    """Whether the old folder waits there for its name."""
    return (place / OLD).is_dir() and (place / NEW).is_dir()


def _remove(place: Path) -> None:
    if (place / OLD).is_dir():
        (place / OLD).rename(place / REMOVED)  # so that half of it is never put back
    shutil.rmtree(place)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.saving-"


def _places(folder: Path) -> list[Path]:
    """What saves of this folder have left beside it, or are writing now."""
    if not folder.parent.is_dir():
        return []
    return [path for path in folder.parent.iterdir() if path.name.startswith(_prefix(folder)) and path.is_dir()]


def _in_use(place: Path) -> bool:
    """Whether the process that writes there still runs."""
    try:
        with FileLock(place / LOCK, timeout=0):
            return False
    except Timeout:
        return True
