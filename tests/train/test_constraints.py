"""Penalties before an optimiser step, constraints after it."""

import pytest
import torch

import timm_contconv as tcc

from ..models_for_tests import layers_of
from .shared import dcls_model

model = pytest.fixture(dcls_model)


def test_penalty_is_the_mean_over_layers_and_zero_where_none_is(model):
    layers = layers_of(model)
    expected = sum(layer.penalty() for layer in layers) / len(layers)
    torch.testing.assert_close(tcc.penalty(model), expected)
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
