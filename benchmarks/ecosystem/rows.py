"""What the rows share: models whose layers all matter, images, and the checks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import timm_contconv as tcc
from tests.models_for_tests import awake, layers_of, scatter

__all__ = ["MODELS", "SIZE", "Expected", "Row", "check_geometry", "classifier", "close", "images", "train", "woken"]

MODELS = {
    "dcls": "test_convnext_dcls_gauss",
    "smp": "test_convnext_smp",
    "flex": "test_convnext_flex",
    "genv": "test_resnet_genv",
    "cc": "test_resnet_cc",
}
SIZE = 64
Row = Callable[[str], None]


class Expected(Exception):
    """A cell that is red for a reason that is known and said."""


def classifier(name: str) -> nn.Module:
    """A model with ten classes whose layers all matter."""
    return woken(timm.create_model(name, num_classes=10))


@torch.no_grad()
def woken(model: nn.Module) -> nn.Module:
    """The model with scales and geometry set so that all layers matter; FlexConv's masks are centred, as they start."""
    scatter(awake(model))
    for layer in layers_of(model):
        if layer.method == "flex":
            layer.geometry["mask_mean"].zero_()
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE)


def train(module: nn.Module, loss: Callable[[], Tensor], steps: int = 3) -> None:
    """Steps with the groups and constraints of this package; then the geometry is checked."""
    optimizer = torch.optim.AdamW(tcc.param_groups(module, 1e-3, 0.05, apply_lr_scale=True))
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        tcc.constrain_(module)
    check_geometry(module, optimizer)


def check_geometry(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Geometry has learned, is finite and within its bounds, and is not decayed."""
    decayed = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
    assert layers_of(module)
    for layer in layers_of(module):
        for name, value in layer.geometry.items():
            assert id(value) not in decayed, f"{name} is decayed"
            assert value.isfinite().all(), f"{name} is not finite"
            if value.requires_grad:
                assert optimizer.state[value]["exp_avg"].any(), f"{name} got no gradient"
    before = copy.deepcopy(module.state_dict())
    tcc.constrain_(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was out of its bounds"


@torch.no_grad()
def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """To a tolerance relative to the largest output."""
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"differs by {error:.1e}"
