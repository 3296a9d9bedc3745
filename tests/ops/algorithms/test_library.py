"""The compiled library: building, waiting, building again, and what is not loaded.

A script stands in for the compiler, as ccache does: it takes the library that the tests have compiled before, so that
nobody waits for ten more compilations.
"""

import ctypes
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from timm_contconv.ops.algorithms.library import compiler, load

COMPILER = """#!/bin/sh
echo "$@" >> {log}
sleep {seconds}
{refusal}
for target; do :; done
{result}
"""
NO_OPENMP = """case " $* " in *" -fopenmp "*) echo "unsupported option '-fopenmp'" >&2; exit 1;; esac"""


@pytest.fixture
def built(cache: Path) -> Path:
    """The library that the tests have compiled, in a folder of its own."""
    return next(cache.glob("*.so"))


class FakeCompiler:
    """A program that writes down its arguments and makes `result`."""

    def __init__(self, folder: Path, library: Path, refusal: str = "", result: str = "", seconds: float = 0) -> None:
        self.path, self.log = folder / "compiler", folder / "log"
        result = result or f'cp "{library}" "$target"'
        self.path.write_text(COMPILER.format(log=self.log, seconds=seconds, refusal=refusal, result=result))
        self.path.chmod(0o700)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def fake(tmp_path_factory, built, monkeypatch) -> FakeCompiler:
    compiler = FakeCompiler(tmp_path_factory.mktemp("compiler"), built)
    monkeypatch.setenv("CXX", str(compiler.path))
    return compiler


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """An empty cache folder, which is not there yet."""
    return tmp_path_factory.mktemp("home") / "cache"


def works(library: ctypes.CDLL) -> bool:
    return library.contconv_lanes() in (4, 8, 16)


def test_it_is_built_once_and_for_nobody_else(fake, folder, capfd):
    assert works(load(folder))
    assert "once (about 10 s)" in capfd.readouterr().err
    assert works(load(folder))
    assert capfd.readouterr().err == ""
    assert len(fake.calls()) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(next(folder.glob("*.so")).stat().st_mode) == 0o700


def test_a_built_library_needs_no_compiler(built, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "/no/compiler")
    assert works(load(built.parent))


def test_one_process_builds_while_another_waits(tmp_path_factory, built, folder, monkeypatch):
    slow = FakeCompiler(tmp_path_factory.mktemp("slow"), built, seconds=1)
    monkeypatch.setenv("CXX", str(slow.path))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=lambda: sys.exit(not works(load(folder)))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(slow.calls()) == 1


def test_a_library_that_does_not_load_is_built_again(fake, folder, built):
    folder.mkdir(mode=0o700)
    (folder / built.name).write_bytes(b"half of it")
    assert works(load(folder))
    assert len(fake.calls()) == 1


def test_it_is_built_again_only_once(tmp_path_factory, built, folder, monkeypatch):
    broken = FakeCompiler(tmp_path_factory.mktemp("broken"), built, result='echo nothing > "$target"')
    monkeypatch.setenv("CXX", str(broken.path))
    with pytest.raises(OSError, match="direct-"):
        load(folder)
    assert len(broken.calls()) == 1


@pytest.mark.skipif(os.name != "posix", reason="other systems have other permissions")
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_can_change_is_not_loaded(built, what):
    path = built.parent if what == "folder" else built
    path.chmod(0o777)
    with pytest.raises(PermissionError, match=f"{path}: other users can change it.*TIMM_CONTCONV_CACHE"):
        load(built.parent)


def test_nothing_is_built_into_a_folder_that_others_can_change(fake, folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="other users"):
        load(folder)
    assert fake.calls() == []


def test_cxx_may_have_arguments(fake, folder, monkeypatch):
    monkeypatch.setenv("CXX", f"'{fake.path}' --first -DNAME='a b'")
    assert works(load(folder))
    assert fake.calls()[0].startswith("--first -DNAME=a b -std=c++17")


def test_a_missing_cxx_is_an_error_that_names_it(folder, monkeypatch):
    monkeypatch.setenv("CXX", "/no/compiler -O1")
    with pytest.raises(FileNotFoundError, match=r"CXX='/no/compiler -O1': there is no program '/no/compiler'"):
        load(folder)


def test_without_openmp_it_is_built_for_one_thread(tmp_path_factory, built, folder, monkeypatch):
    apple = FakeCompiler(tmp_path_factory.mktemp("apple"), built, refusal=NO_OPENMP)
    monkeypatch.setenv("CXX", str(apple.path))
    assert works(load(folder))
    assert ["-fopenmp" in call for call in apple.calls()] == [True, False]


@pytest.mark.slow
def test_a_compiler_without_openmp_really_works(tmp_path_factory, built, folder, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    apple = FakeCompiler(
        tmp_path_factory.mktemp("apple"), built, refusal=NO_OPENMP, result=f'exec {compiler()[0]} "$@"'
    )
    monkeypatch.setenv("CXX", str(apple.path))
    assert works(load(folder))


def test_what_a_compiler_says_is_in_the_error(tmp_path_factory, built, folder, monkeypatch):
    failing = FakeCompiler(tmp_path_factory.mktemp("failing"), built, refusal="echo no space left >&2; exit 1")
    monkeypatch.setenv("CXX", str(failing.path))
    with pytest.raises(subprocess.CalledProcessError) as caught:
        load(folder)
    assert caught.value.stderr == "no space left\n"
    assert list(folder.glob("*.so")) == []


def read_only(folder: Path) -> Path:
    """A folder in which nothing can be made, also not by root."""
    if os.geteuid() == 0:
        return Path("/sys")
    folder.chmod(0o500)
    return folder


FORWARD = """
import os, pwd, sys, warnings, torch
from timm_contconv import ops

def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown

x, weight = torch.randn(2, 64, 28, 28), torch.randn(64, 1, 23, 23)
expected = torch.nn.functional.conv2d(x, weight, None, 1, 11, 1, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with ops.measuring(True):
        for _ in range(2):
            out = ops.conv(x, weight, None, (1, 1), (11, 11), 64)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
for each in caught:
    print(each.category.__name__, str(each.message).replace("\\n", " "))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("home", ["none", "read-only"])
def test_without_a_home_that_can_be_written_convolutions_run(home, tmp_path, fake):
    """The library and the measurements are each missed once, and the warning says why."""
    unset = ("HOME", "XDG_CACHE_HOME", "TIMM_CONTCONV_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    if home == "read-only":
        environment["HOME"] = str(read_only(tmp_path))
    result = subprocess.run(
        [sys.executable, "-c", FORWARD], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "timm_contconv" in line]
    assert len(lines) == 2, result.stdout
    assert all(line.startswith("RuntimeWarning timm_contconv: ") for line in lines)
    assert any("compiled depthwise convolution is not available" in line for line in lines)
    assert any("measurements are not kept" in line for line in lines)
    reason = "there is no home folder; set TIMM_CONTCONV_CACHE" if home == "none" else "/timm_contconv"
    assert all(reason in line or "/.cache" in line for line in lines)
    assert fake.calls() == []
