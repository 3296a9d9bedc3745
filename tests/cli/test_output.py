"""What `contconv` prints into files, closed streams, full disks and small terminals. Processes of their own."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from typer.testing import CliRunner

from contconv import app

ROOT = Path(__file__).parents[2]
ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


def start(*arguments, environment=None, **streams):
    command = [sys.executable, "-c", "from contconv import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.Popen(command, env=environment, **{"stdout": -1, "stderr": -1, "stdin": -3, **streams})


def terminal(columns):
    """Both ends of a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    return ours, theirs


def read_all(descriptor):
    text = b""
    try:
        while part := os.read(descriptor, 65536):
            text += part
    except OSError:  # the other end is closed
        pass
    return text.decode()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{case: (exit code, standard output, standard error)}; both processes run at once."""
    show = ("show", "test_convnext_dcls")
    ours, theirs = terminal(20)
    saved = str(tmp_path_factory.mktemp("closed") / "saved")
    save = ("patch", "test_resnet", "genv", "--init", "random", "--save", saved)
    processes = {
        "closed": start(*save, stdout=None, stderr=None, preexec_fn=lambda: [os.close(fd) for fd in (0, 1, 2)]),
        "narrow": start(*show, stdout=theirs, environment={"COLUMNS": "", **ASCII}),
    }
    os.close(theirs)
    shown = read_all(ours)
    os.close(ours)
    outputs = {name: process.communicate() for name, process in processes.items()}
    outputs["narrow"] = (shown.encode(), b"")
    results = {n: (processes[n].returncode, *((t or b"").decode() for t in o)) for n, o in outputs.items()}
    return {**results, "saved": Path(saved)}


def test_an_encoding_without_our_characters():
    process = start("--help", environment=ASCII)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert printed.isascii()
    assert b"patch" in printed


def test_a_full_disk_is_told_in_one_line():
    with Path("/dev/full").open("w") as full:
        process = start("--version", stdout=full)
        _, error = process.communicate()
    assert process.returncode == 1
    assert error == b"standard output can't be written: No space left on device\n"


@pytest.mark.slow
def test_all_streams_closed_as_in_a_daemon(ended):
    """Nothing is printed into the files that were opened meanwhile."""
    assert ended["closed"][0] == 0
    weights = (ended["saved"] / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    assert max(t["data_offsets"][1] for k, t in json.loads(weights[8 : 8 + length]).items() if k != "__metadata__") == (
        len(weights) - 8 - length
    )


@pytest.mark.slow
def test_a_terminal_of_20_columns_shows_all_values(ended):
    """In ASCII, where "×" becomes "x"."""
    code, shown, _ = ended["narrow"]
    assert code == 0
    text = re.sub(r"\x1b\[[\d;]*m|\s", "", shown)
    for value in ("name:stages.0.blocks.0.conv_dw", "after:DclsConv2d17x17/26", "receptivefield:7x7->17x17"):
        assert value in text


def test_errors_go_to_standard_error_also_with_json():
    for arguments in (
        ("patch", "no_such", "dcls", "--json"),
        ("show", "no_such"),
        ("run", "--penalty", "inf", __file__),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.count("expected") + result.stderr.count("no such") >= 1


@pytest.mark.parametrize("command", [("show",), ("patch", "test_resnet")])
def test_a_binary_file_in_place_of_a_recipe_is_named(command, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\x80\x04\xff")
    result = CliRunner().invoke(app, [*command, str(path)])
    assert result.exit_code == 2
    assert result.stderr.startswith("recipe.toml: not a TOML file")
