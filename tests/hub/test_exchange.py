"""A folder is replaced as a whole, whatever happens in between."""

import itertools
import os
import sys

import pytest

from timm_contconv.hub import exchange
from timm_contconv.hub.exchange import made_folder, replaced, restore

from ..helpers import slow_but

STEPS = 90  # more than the lines that one exchange runs


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", "old")
    return tmp_path / "model"


def write(folder, text):
    for name in ("a", "b"):
        (folder / name).write_text(text)


def content(folder):
    """What the files of a whole folder say."""
    (text,) = {(folder / name).read_text() for name in ("a", "b")}
    return text


def save(folder, text):
    with replaced(folder) as new:
        write(new, text)


def at_line(number, action):
    """Trace that calls `action` before the numbered line of exchange.py that runs."""
    left = [number]

    def trace(frame, event, argument):
        if frame.f_code.co_filename != exchange.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                action()
        return trace

    return trace


def interrupted_save(folder, number, action):
    """Save, with `action` called before one of the lines; whether it came to that line."""
    reached = []
    sys.settrace(at_line(number, lambda: (reached.append(True), action())))
    try:
        save(folder, "new")
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return bool(reached)


def interrupt():
    raise KeyboardInterrupt


def is_killed(folder, number):
    """Save in a process that ends, without clean-up, before one of the lines; whether it came to that line."""
    process = os.fork()
    if process == 0:
        interrupted_save(folder, number, lambda: os._exit(9))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def test_it_replaces_and_leaves_nothing_beside(folder):
    save(folder, "new")
    assert content(folder) == "new"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("how", slow_but(["interrupted", "killed"], "interrupted"))
def test_at_every_line_one_whole_folder_stands_or_is_restored(folder, how):
    seen = set()
    for number in itertools.count(1):
        ended = interrupted_save(folder, number, interrupt) if how == "interrupted" else is_killed(folder, number)
        restore(folder)
        seen.add(content(folder))
        save(folder, "old")
        assert content(folder) == "old"
        assert list(folder.parent.iterdir()) == [folder]
        if not ended:  # it came past the last line
            break
    assert seen == {"old", "new"}
    assert number > 20


def test_the_first_save_leaves_a_whole_folder_or_none(tmp_path):
    folder = tmp_path / "model"
    for number in range(1, STEPS):
        interrupted_save(folder, number, interrupt)
        assert not folder.exists() or content(folder) == "new"
        save(folder, "new")
        assert list(tmp_path.iterdir()) == [folder]
        for path in (*folder.iterdir(), folder):
            path.unlink() if path.is_file() else path.rmdir()


def test_an_error_while_writing_leaves_the_old_folder(folder):
    with pytest.raises(FileNotFoundError), replaced(folder) as new:
        (new / "missing" / "a").write_text("half")
    assert content(folder) == "old"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_appears_in_between_is_not_replaced_and_the_old_one_is_kept(folder):
    """Before each line in turn somebody puts a folder there, if none is."""

    def appear():
        if not folder.exists():
            folder.mkdir()
            (folder / "theirs").touch()

    messages = []
    for number in range(1, STEPS):
        try:
            interrupted_save(folder, number, appear)
        except OSError as error:
            messages.append(str(error))
            (old,) = folder.parent.glob(".model.saving-*/old")
            assert str(old) in messages[-1]
            (folder / "theirs").unlink()
        restore(folder)
        assert content(folder) in ("old", "new")
    assert messages


def test_what_a_running_process_writes_is_left_alone(folder):
    with replaced(folder) as theirs:
        write(theirs, "theirs")
        save(folder, "ours")
        assert content(theirs) == "theirs"
    assert content(folder) == "theirs"
    assert list(folder.parent.iterdir()) == [folder]


def test_folders_that_stay_empty_are_removed_again(tmp_path):
    (tmp_path / "theirs").mkdir()
    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "theirs" / "a" / "b"):
        interrupt()
    assert [*tmp_path.rglob("*")] == [tmp_path / "theirs"]
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "theirs" / "a" / "b"):
        interrupt()
    assert [*tmp_path.rglob("*")] == [tmp_path / "theirs"]
    with made_folder(tmp_path / "ours" / "a"):
        (tmp_path / "ours" / "file").touch()
    assert [*(tmp_path / "ours").iterdir()] == [tmp_path / "ours" / "file"]
