"""Parameter groups, penalties and constraints."""

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler

import timm_contconv as tcc
from timm_contconv.layers import DclsConv2d


@pytest.fixture
def model():
    return timm.create_model("test_convnext_dcls", num_classes=10)


def test_every_parameter_is_in_exactly_one_group(model):
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_positions_learn_five_times_faster_without_decay(model):
    optimizer = torch.optim.SGD(tcc.param_groups(model, lr=0.1, weight_decay=0.05))
    CosineLRScheduler(optimizer, t_initial=10)
    rates = {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }
    assert rates["stages.2.dcls_geometry.position"] == (0.5, 0.0)
    assert rates["stages.2.blocks.0.conv_dw.element_weight"] == (0.1, 0.05)
    assert rates["stages.2.blocks.0.conv_dw.bias"] == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group(model):
    model.requires_grad_(False)
    model.head.fc.weight.requires_grad_(True)
    groups = tcc.param_groups(model, lr=0.1, weight_decay=0.05)
    assert [name for group in groups for name in group["param_names"]] == ["head.fc.weight"]


def test_penalty_is_the_mean_over_layers_and_zero_where_none_is(model):
    layers = [m for m in model.modules() if isinstance(m, DclsConv2d)]
    expected = sum(layer.penalty() for layer in layers) / len(layers)
    torch.testing.assert_close(tcc.penalty(model), expected)
    assert tcc.penalty(torch.nn.Linear(2, 2)).item() == 0


def test_penalty_pushes_elements_apart(model):
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "position" in n], lr=100.0)
    before = tcc.penalty(model).item()
    for _ in range(10):
        optimizer.zero_grad()
        tcc.penalty(model).backward()
        optimizer.step()
        tcc.constrain_(model)
    assert tcc.penalty(model).item() < 0.9 * before
