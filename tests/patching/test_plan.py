"""Plans: what a patch will do, worked out without changing the model."""

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.patching import plan_patch

from ..models_for_tests import Snapshot, layers_of


@pytest.mark.parametrize(
    ("base", "recipe"),
    [("test_convnext", "dcls"), ("test_convnext", "smp"), ("test_convnext", "flex"), ("resnet18", "genv5"),
     ("test_resnet", "cc")],
)  # fmt: skip
def test_a_plan_changes_nothing(base, recipe):
    model = timm.create_model(base)
    before, state = Snapshot(model), torch.get_rng_state()
    plan_patch(model, recipe)
    assert before.differences() == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("recipe", ["dcls_gauss", "smp", "genv5"])
def test_a_plan_is_what_the_patch_then_does(recipe):
    model = timm.create_model("resnet18" if recipe == "genv5" else "test_convnext")
    plan = plan_patch(model, recipe, init="random")
    report = tcc.report(tcc.patch(model, recipe, init="random"))
    assert plan.to_dict()["patch"] == report.patch
    assert set(plan.convs) <= {row.name for row in report.rows}
    assert plan.refused == report.refused
    homes = {".".join(home) for home in plan.homes}
    assert homes == {row.name for row in report.rows if "geometry" in row.name}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.even = nn.Conv2d(4, 4, 2, padding=1, groups=4)


def test_a_plan_says_what_where_and_why_not():
    plan = plan_patch(Mixed(), "dcls", kernel_size=5, kernel_count=2)
    values = plan.to_dict()
    assert values["replaced"]["first"]["kernel_size"] == 5
    assert values["refused"].keys() == {"even"}
    assert "can't be centred on a (2, 2) kernel" in values["refused"]["even"]
    text = " ".join(str(plan).split())
    for said in ("first", "kernel_size=5", "even", "refused", "can't be centred on a (2, 2) kernel"):
        assert said in text


def test_a_plan_names_other_changes():
    plan = plan_patch(timm.create_model("resnet18"), "genv5")
    assert plan.to_dict()["rewired"] == ["maxpool", "layer1.0.conv1.stride", "layer1.0.downsample"]
    assert "MaxPool2d" in str(plan)


def test_a_model_on_the_meta_device_is_planned_as_one_with_values():
    with torch.device("meta"):
        empty = timm.create_model("test_convnext")
    assert plan_patch(empty, "dcls").to_dict() == plan_patch(timm.create_model("test_convnext"), "dcls").to_dict()


def test_geometry_lives_in_the_innermost_module_that_holds_all_its_layers():
    """Not in a container, which would run it as a layer, nor in the model, of which extractors take parts."""
    assert plan_patch(timm.create_model("test_convnext"), "dcls").homes == tuple(
        (f"stages.{stage}", "dcls_geometry") for stage in (1, 2, 3)
    )
    flat = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(3)))
    assert plan_patch(flat, "dcls", kernel_count=2).homes == (("0", "dcls_geometry"),)


def test_groups_of_different_shapes_do_not_share():
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, groups=c) for c in (4, 4, 6, 6))

    model = nn.Sequential(Stage())
    plan = plan_patch(model, "dcls", kernel_count=2)
    assert plan.groups == (("0.convs.0", "0.convs.1"), ("0.convs.2", "0.convs.3"))
    assert plan.homes == (("0", "dcls_geometry"), ("0", "dcls_geometry_2"))
    tcc.patch(model, "dcls", kernel_count=2)
    assert len({id(layer.geometry["position"]) for layer in layers_of(model)}) == 2
