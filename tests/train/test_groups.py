"""Parameter groups: what is decayed, and at which rate everything learns."""

import copy
import warnings

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import Muon, create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import timm_contconv as tcc

from ..models_for_tests import REGISTERED, awake, layers_of
from .shared import dcls_model, geometry_ids, loss_of, smallest_model

model = pytest.fixture(dcls_model)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("recipe", [None, *REGISTERED])
def test_every_parameter_is_in_exactly_one_group(recipe, layer_decay):
    model = timm.create_model(smallest_model(recipe) if recipe else "test_convnext")
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_positions_learn_five_times_faster_without_decay(model):
    optimizer = torch.optim.SGD(tcc.param_groups(model, lr=0.1, weight_decay=0.05))
    CosineLRScheduler(optimizer, t_initial=10)
    rates = {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }
    assert rates["stages.2.dcls_geometry.position"] == (0.5, 0.0)
    assert rates["stages.2.blocks.0.conv_dw.kernel.weight"] == (0.1, 0.05)
    assert rates["stages.2.blocks.0.conv_dw.bias"] == (0.1, 0.0)


def test_radii_learn_slower_than_points(model):
    """Released trainings of SMPConv: a tenth for the radii, the weights' rate for the coordinates."""
    points = timm.create_model("test_convnext_smp")
    for scale, radius, coordinate in ((None, 0.01, 0.1), ({"coordinate": 2.0}, 0.01, 0.2), (3.0, 0.3, 0.3)):
        groups = tcc.param_groups(points, lr=0.1, weight_decay=0.05, position_lr_scale=scale)
        rates = {n.rpartition(".")[2]: g["lr"] * g["lr_scale"] for g in groups for n in g["param_names"]}
        assert rates["radius"] == pytest.approx(radius)
        assert rates["coordinate"] == pytest.approx(coordinate)
    with pytest.raises(ValueError, match=r"position_lr_scale\['radius'\]: no layer of the model has it; there are pos"):
        tcc.param_groups(model, 0.1, 0.05, position_lr_scale={"radius": 0.1})
    with pytest.raises(ValueError, match=r"position_lr_scale\['radius'\]=0: expected more than 0"):
        tcc.param_groups(points, 0.1, 0.05, position_lr_scale={"radius": 0})


def test_weights_without_geometry_are_grouped_as_timm_groups_them(model):
    mine = {
        name: (group["weight_decay"], group["lr_scale"])
        for group in tcc.param_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.7)
        for name in group["param_names"]
    }
    theirs = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05, layer_decay=0.7).param_groups
    expected = {id(p): (group["weight_decay"], group["lr_scale"]) for group in theirs for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in geometry_ids(model):
            assert mine[name] == expected[id(parameter)], name


def test_shared_geometry_has_the_layer_decay_of_the_last_layer_that_uses_it(model):
    scales = {
        name: group["lr_scale"]
        for group in tcc.param_groups(model, lr=0.1, weight_decay=0.05, layer_decay=0.5, position_lr_scale=3)
        for name in group["param_names"]
    }
    blocks = [scales[f"stages.2.blocks.{index}.conv_dw.kernel.weight"] for index in range(4)]
    assert blocks[0] < blocks[-1] < 1
    assert scales["stages.2.dcls_geometry.position"] == 3 * blocks[-1]


def test_frozen_parameters_are_in_no_group(model):
    model.requires_grad_(False)
    model.head.fc.weight.requires_grad_(True)
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05)
    assert [name for group in groups for name in group["param_names"]] == ["head.fc.weight"]


def test_a_part_without_its_layers_shared_geometry_is_refused(model):
    stage = model.stages[2]
    part = nn.Sequential(stage.downsample, stage.blocks)
    with pytest.raises(ValueError, match=r"1\.0\.conv_dw, .*registered outside of this Sequential, .*pass its parent"):
        tcc.param_groups(part, lr=0.1, weight_decay=0.05)
    whole = tcc.param_groups(stage, lr=0.1, weight_decay=0.05)
    assert "dcls_geometry.position" in [name for group in whole for name in group["param_names"]]
    for layer in layers_of(part):
        for parameter in layer.geometry.values():
            parameter.requires_grad_(False)
    groups = tcc.param_groups(part, lr=0.1, weight_decay=0.05)
    assert sum(len(group["params"]) for group in groups) == len(list(part.parameters()))


@pytest.mark.parametrize("recipe", REGISTERED)
def test_every_parameter_of_a_feature_extractor_is_in_a_group(recipe):
    model = timm.create_model(smallest_model(recipe), features_only=True)
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05)
    used = geometry_ids(model) | {id(p) for p in model.parameters()}
    assert {id(p) for group in groups for p in group["params"]} == used


@pytest.mark.parametrize("value", [-1e-3, float("inf"), float("nan"), "5"])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "layer_decay"])
def test_rates_out_of_range_are_refused(model, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected a finite number of at least 0"):
        tcc.param_groups(model, **{"lr": 1e-3, "weight_decay": 0.05, name: value})


@pytest.mark.parametrize("value", [0, -5.0, float("inf"), float("nan"), "5"])
def test_a_learning_rate_scale_of_positions_out_of_range_is_refused(model, value):
    with pytest.raises(ValueError, match=f"position_lr_scale={value!r}: expected more than 0, and finite"):
        tcc.param_groups(model, 1e-3, 0.05, position_lr_scale=value)


# What optimisers that know nothing of this package see


@pytest.mark.parametrize("recipe", REGISTERED)
def test_timms_factory_decays_no_geometry_of_a_feature_extractor(recipe):
    model = timm.create_model(smallest_model(recipe), features_only=True)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & geometry_ids(model)


@pytest.mark.parametrize("coarse", [False, True])
def test_shared_geometry_is_in_timms_group_of_the_last_layer_that_uses_it(model, coarse):
    group_of = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    plain = timm.create_model("test_convnext")
    for name, group in group_parameters(plain, plain.group_matcher(coarse=coarse), reverse=True).items():
        assert group_of[name.replace("conv_dw.weight", "conv_dw.kernel.weight")] == group, name
    assert group_of["stages.2.dcls_geometry.position"] == group_of["stages.2.blocks.3.conv_dw.bias"]


def test_biases_and_filters_of_flexconv_have_no_decay():
    groups = tcc.param_groups(timm.create_model("flexnet3"), lr=0.1, weight_decay=0.05)
    decayed = {name.split(".")[-1] for group in groups if group["weight_decay"] for name in group["param_names"]}
    assert decayed == {"hidden_weight", "output_weight", "weight"}
    scales = {name.split(".")[-1]: group["lr_scale"] for group in groups for name in group["param_names"]}
    assert (scales["sine_bias"], scales["gamma"], scales["mask_sigma"]) == (1.0, 1.0, 0.1)


def test_muon_takes_only_weights():
    model = awake(timm.create_model("test_resnet_cc", num_classes=10))
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05)
    optimizer = Muon(groups)
    loss_of(model).backward()
    optimizer.step()
    moments = {id(p) for p, state in optimizer.state.items() if "momentum_buffer" in state}
    assert moments
    assert not moments & geometry_ids(model)


def test_rates_can_be_given_to_schedulers_that_know_no_lr_scale(model):
    scaled = tcc.param_groups(model, 0.1, 0.05, layer_decay=0.5, apply_lr_scale=True)
    for group, known in zip(scaled, tcc.param_groups(model, 0.1, 0.05, layer_decay=0.5), strict=True):
        assert group["lr"] == pytest.approx(0.1 * known["lr_scale"])
        assert "lr_scale" not in group
        assert group["param_names"] == known["param_names"]


class Wrapper(nn.Module):
    """As a segmentation network or a Trainer's model: it has no `no_weight_decay`."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def test_an_optimizer_that_decays_geometry_is_warned_of_once(model):
    wrapper = Wrapper(model)
    optimizer = create_optimizer_v2(wrapper, "adamw", lr=0.1, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    wrong = len(geometry_ids(model) & decayed)
    assert wrong
    with pytest.warns(
        UserWarning, match=rf"AdamW: weight_decay acts on {wrong} parameters of DclsConv2d .*tcc\.param_g"
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05).step()
        torch.optim.AdamW(tcc.param_groups(wrapper, lr=0.1, weight_decay=0.05)).step()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_report_names_what_must_not_be_decayed(model):
    expected = {name for name, parameter in model.named_parameters() if id(parameter) in geometry_ids(model)}
    assert set(tcc.report(model).no_weight_decay) == expected
    assert set(tcc.report(Wrapper(model)).no_weight_decay) == {f"model.{name}" for name in expected}
    assert tcc.report(torch.compile(model)).rows == tcc.report(model).rows
    with pytest.raises(ValueError, match="holds several patched models, 0.model, 1: pass one of them"):
        tcc.report(nn.Sequential(Wrapper(model), copy.deepcopy(model)))
