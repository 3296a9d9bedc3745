"""`contconv run`: scripts as python runs them, with the constraints of the methods."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from contconv import app
from timm_contconv.cli.run import run_script

ROOT = Path(__file__).parents[2]

SCRIPT = """
import pickle, sys
import neighbour

class Own:
    pass

assert pickle.loads(pickle.dumps(Own())).__class__ is Own  # found again in __main__
print([__name__, __file__, sys.argv, sys.path[0], neighbour.__file__])
if "--help" in sys.argv:
    sys.exit(7)
"""

TRAINING = """
import sys, timm, torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

torch.manual_seed(0)
model = timm.create_model("test_convnext_dcls", num_classes=10)
optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05)
CosineLRScheduler(optimizer, t_initial=10)
for _ in range(5):
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
torch.save((dict(model.named_parameters()), [group["lr"] for group in optimizer.param_groups]), sys.argv[1])
"""


def contconv(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def script(tmp_path):
    (tmp_path / "neighbour.py").touch()
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_a_script_gets_all_that_follows_it_and_gives_its_exit_code(script, tmp_path):
    flags = ["data", "--penalty", "9", "-x", "--", "--help"]
    command = [sys.executable, "-m", "timm_contconv", "run", "--position-lr-scale", "5", script.name, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    folder = str(tmp_path)
    seen = ["__main__", "script.py", ["script.py", *flags], folder, str(tmp_path / "neighbour.py")]
    assert done.stdout.strip() == str(seen)


def test_a_script_that_does_not_exit_by_itself_exits_with_0(script):
    result = contconv("run", script)
    assert result.exit_code == 0
    assert f"['__main__', '{script}', ['{script}'], " in result.output


def test_the_interpreter_is_left_as_it_was(script):
    before = sys.argv, sys.path, sys.modules["__main__"]
    assert run_script(script, ["--help"]) == 7
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


FAILING = """
def inner():
    raise ValueError("mine")
try:
    {}["a"]
except KeyError:
    inner()
"""


@pytest.mark.parametrize("text", [FAILING, "a = (", "raise ValueError"])
def test_an_error_of_the_script_is_shown_as_python_shows_it(text, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(text)
    python = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    result = contconv("run", path)
    assert (result.exit_code, result.stderr) == (python.returncode, python.stderr)


def test_ctrl_c_ends_a_script_with_its_frames_and_130(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("# as Ctrl-C does\nraise KeyboardInterrupt")
    result = contconv("run", path)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[1] == f'  File "{path}", line 2, in <module>'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such.py",), "'no_such.py' does not exist"),
        # patterns, because typer 0.19 has its own words for these two
        (("--penality", "1", "script.py"), "No such option:? '?--penality"),
        (
            ("--penalty", "-1", "script.py"),
            "Invalid value for '--penalty': (Input should be greater than or equal to 0|-1.0 is not in the range x>=0)",
        ),
        (("--position-lr-scale", "0", "script.py"), "--position-lr-scale=0: expected 'paper' or a finite number"),
        (("--position-lr-scale", "inf", "script.py"), "--position-lr-scale=inf: expected 'paper' or a finite number"),
        (("--penalty", "inf", "script.py"), "--penalty=inf: expected a finite number"),
        (("--penalty-power", "2", "script.py"), "--penalty-power=2: expected --penalty too"),
    ],
)
def test_mistakes_are_explained_before_the_script_starts(script, monkeypatch, arguments, message):
    monkeypatch.chdir(script.parent)
    result = contconv("run", *arguments)
    assert result.exit_code == 2
    assert re.search(message, re.sub(r"[\s│]+", " ", result.output))
    assert "__main__" not in result.output


def test_an_unmodified_training_script_is_constrained_and_gets_its_rates(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TRAINING)
    results = {}
    for name, options in {
        "plain": (), "asked": ("--position-lr-scale", 5, "--penalty", 0.1), "paper": ("--position-lr-scale", "paper"),
    }.items():  # fmt: skip
        assert contconv("run", *options, path, tmp_path / name).exit_code == 0
        results[name] = torch.load(tmp_path / name)
    for parameters, _ in results.values():
        positions = [p for name, p in parameters.items() if name.endswith("position")]
        assert max(p.abs().max() for p in positions) <= 8
    assert sorted(set(results["plain"][1])) == [0.1]
    assert sorted(set(results["asked"][1])) == sorted(set(results["paper"][1])) == [0.1, 0.5]
