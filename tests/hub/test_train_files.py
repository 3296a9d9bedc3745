"""hub/*/train.yaml: argument files for timm's train.py, with the settings of the papers."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.optim import get_optimizer_class
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "hub").glob("*/train.yaml"))


def arguments_of_train_py():
    """name: type, as recorded from timm's script."""
    lines = (Path(__file__).parents[1] / "data" / "timm_train_arguments.txt").read_text().splitlines()
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
