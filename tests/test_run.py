"""`contconv run`, and the argument files for timm's train.py."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.optim import get_optimizer_class
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from typer.testing import CliRunner

from timm_contconv.cli import app
from timm_contconv.cli.run import run_script

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "hub").glob("*/train.yaml"))

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


def test_an_error_of_the_script_is_its_own(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("raise ValueError('mine')")
    result = contconv("run", path)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such.py",), "'no_such.py' does not exist"),
        (("--penality", "1", "script.py"), "No such option: --penality"),
        (("--penalty", "-1", "script.py"), "Invalid value for '--penalty': Input should be greater than or equal to 0"),
        (("--position-lr-scale", "0", "script.py"), "--position-lr-scale=0.0: expected more than 0"),
        (("--position-lr-scale", "inf", "script.py"), "--position-lr-scale=inf: expected more than 0, and finite"),
        (("--penalty", "inf", "script.py"), "--penalty=inf: expected a finite number"),
        (("--penalty-power", "2", "script.py"), "--penalty-power=2: expected --penalty too"),
    ],
)
def test_mistakes_are_explained_before_the_script_starts(script, monkeypatch, arguments, message):
    monkeypatch.chdir(script.parent)
    result = contconv("run", *arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert "__main__" not in result.output


def test_a_power_without_a_penalty_is_refused_before_the_script_starts(script):
    result = contconv("run", "--penalty-power", "2", script)
    assert result.exit_code != 0
    said = re.sub(r"[\s│]+", " ", f"{result.output} {result.exception}")
    assert "--penalty-power" in said
    assert "__main__" not in said


def test_an_unmodified_training_script_is_constrained_and_gets_its_rates(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TRAINING)
    results = {}
    for name, options in {"plain": (), "asked": ("--position-lr-scale", 5, "--penalty", 0.1)}.items():
        assert contconv("run", *options, path, tmp_path / name).exit_code == 0
        results[name] = torch.load(tmp_path / name)
    for parameters, _ in results.values():
        positions = [p for name, p in parameters.items() if name.endswith("position")]
        assert max(p.abs().max() for p in positions) <= 8
    assert sorted(set(results["plain"][1])) == [0.1]
    assert sorted(set(results["asked"][1])) == [0.1, 0.5]


# Argument files


def arguments_of_train_py():
    """name: type, as recorded from timm's script."""
    lines = (ROOT / "tests" / "data" / "timm_train_arguments.txt").read_text().splitlines()
    return dict(line.split() for line in lines if not line.startswith("#"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.parent.name)
def recipe(request):
    return yaml.safe_load(request.param.read_text())


def test_the_papers_trainings_are_there():
    models = {yaml.safe_load(path.read_text())["model"] for path in RECIPES}
    dcls = {"convnext_tiny_dcls", "convnext_small_dcls", "convnext_base_dcls", "convformer_s18_dcls_gauss"}
    assert models == dcls | {"smpconv_tiny", "smpconv_base", "resnet50_genv"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_each_file_names_its_source_and_its_model(path):
    text = path.read_text()
    assert "# Source: " in text
    assert yaml.safe_load(text)["model"] == path.parent.name.split(".")[0]


def test_keys_and_values_are_arguments_of_timms_train_py(recipe):
    """A config file's keys are not checked by train.py: a wrong one would go unnoticed."""
    known = arguments_of_train_py()
    assert recipe.keys() <= known.keys()
    python = {"int": int, "float": (int, float), "str": str, "bool": bool}
    wrong = {k: v for k, v in recipe.items() if v is not None and not isinstance(v, python[known[k]])}
    assert wrong == {}


def test_models_and_optimizers_exist(recipe):
    assert timm.is_model(recipe["model"])
    get_optimizer_class(recipe["opt"])


def learning_rate(recipe, epoch, updates=10):
    """What timm's scheduler gives at the start of an epoch, for the recipe's own rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe["lr"])
    defaults = {
        "sched_on_updates": False, "warmup_prefix": False, "cooldown_epochs": 0, "min_lr": 0.0, "warmup_lr": 1e-5,
    }  # fmt: skip
    arguments = argparse.Namespace(**{**defaults, **recipe})
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(arguments), updates_per_epoch=updates)
    if arguments.sched_on_updates:
        scheduler.step_update(epoch * updates)
    else:
        scheduler.step(epoch)
    return optimizer.param_groups[0]["lr"], epochs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # warm-up from 0, then half a cosine over what is left: the released code's formula
        ("convnext_tiny_dcls.zenodo_in1k", {0: 0.0, 10: 2e-3, 20: 4e-3, 160: 2.0005e-3, 300: 1e-6}),
        ("smpconv_tiny.in1k", {0: 0.0, 5: 2e-3, 10: 4e-3, 155: 2.0005e-3, 300: 1e-6}),
        # Kobayashi 2023, section 3
        ("resnet50_genv.in1k", {0: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001, 119: 0.0001}),
    ],
)
def test_timms_schedule_is_the_papers(name, expected):
    recipe = yaml.safe_load((ROOT / "hub" / name / "train.yaml").read_text())
    found = {epoch: learning_rate(recipe, epoch)[0] for epoch in expected}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert learning_rate(recipe, 0)[1] == (120 if "resnet" in name else 300)
