"""Penalties before an optimiser step, constraints after it."""

import pytest
import timm
import torch

import timm_contconv as tcc

from ..models_for_tests import layers_of
from .shared import dcls_model

model = pytest.fixture(dcls_model)


def released_repulsion(position: torch.Tensor) -> torch.Tensor:
    """The released formula of a stage's positions, (2, C, 1, m): a double sum over all pairs of elements."""
    points = position.detach().double().movedim(0, -1).flatten(0, 1)
    close = (1 - torch.cdist(points, points)).clamp_min(0).triu(1).sum()
    count = points.shape[1]
    return 2 / (count * (count - 1) * len(points)) * close


def test_penalty_counts_every_shared_set_of_positions_once(model):
    stages = [stage.dcls_geometry.position if hasattr(stage, "dcls_geometry") else None for stage in model.stages]
    sets = {id(layer.geometry["position"]): layer.geometry["position"] for layer in layers_of(model)}
    assert len(sets) == len(stages) < len(layers_of(model))
    expected = sum(map(released_repulsion, sets.values())) / len(sets)
    torch.testing.assert_close(tcc.penalty(model).double(), expected, atol=1e-6, rtol=1e-5)


def test_penalty_of_layers_that_share_only_masks_has_a_term_for_each():
    model = timm.create_model("test_convnext", num_classes=10)
    tcc.patch(
        model, {"layer": {"method": "flex", "kernel_size": 9}, "select": ["depthwise"], "share": "stage"}, init="random"
    )
    layers = layers_of(model)
    assert len({id(layer.kernel.geometry_home) for layer in layers}) < len(layers)
    torch.testing.assert_close(tcc.penalty(model), sum(layer.penalty() for layer in layers) / len(layers))


def test_penalty_is_zero_where_no_layer_has_one():
    assert tcc.penalty(torch.nn.Linear(2, 2)).item() == 0


def test_penalty_without_a_gradient_takes_backward(model):
    plain = torch.nn.Linear(2, 2)
    tcc.penalty(plain).backward()
    (plain(torch.ones(2)).sum() + tcc.penalty(plain)).backward()
    assert plain.weight.grad.tolist() == [[1, 1], [1, 1]]
    model.requires_grad_(False)
    penalty = tcc.penalty(model)
    penalty.backward()
    assert penalty > 0


def test_penalty_pushes_elements_apart(model):
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "position" in n], lr=100.0)
    before = tcc.penalty(model).item()
    for _ in range(10):
        optimizer.zero_grad()
        tcc.penalty(model).backward()
        optimizer.step()
        tcc.constrain_(model)
    assert tcc.penalty(model).item() < 0.9 * before
