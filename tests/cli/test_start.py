"""How the command line starts: what it imports before a command runs, --version and env."""

import importlib.metadata
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from contconv import app

HEAVY = ("torch", "timm", "timm_contconv", "matplotlib", "huggingface_hub")


def contconv(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """`contconv ARGUMENTS` in a process of its own; `code` runs at its exit."""
    program = f"import atexit, sys\nfrom contconv import app\n{code}\napp()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("arguments", [("--help",), ("patch", "--help"), ("run", "--help"), ("--version",)], ids=str)
def test_help_and_version_import_neither_torch_nor_timm(arguments):
    code = f"atexit.register(lambda: print('imported', [name for name in {HEAVY} if name in sys.modules]))"
    result = contconv(*arguments, code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("imported []\n")


def test_version_is_that_of_the_package():
    assert contconv("--version").stdout == f"timm_contconv {importlib.metadata.version('timm_contconv')}\n"


def test_env_says_what_a_bug_report_needs():
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    for package in ("torch", "timm", "timm_contconv", "huggingface-hub"):
        assert lines[package] == importlib.metadata.version(package)
    assert lines["compiled convolution"].endswith(".so")
    assert {"python", "CPU", "compiler", "accelerator", "measured on cpu"} <= lines.keys()
