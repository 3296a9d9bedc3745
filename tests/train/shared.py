"""What the tests of training share."""

import functools

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_contconv as tcc

from ..models_for_tests import awake, layers_of

__all__ = ["dcls_model", "geometry_ids", "loss_of", "smallest_model"]


def dcls_model() -> nn.Module:
    return awake(timm.create_model("test_convnext_dcls", num_classes=10))


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=next(model.parameters()).dtype)
    return F.cross_entropy(model(images), torch.randint(10, (4,), generator=generator))


def geometry_ids(model: nn.Module) -> set[int]:
    return {id(parameter) for layer in layers_of(model) for parameter in layer.geometry.values()}


@functools.cache
def smallest_model(recipe: str) -> str:
    """The smallest architecture that a recipe is registered on."""
    names = tcc.load_patch(recipe).models
    tests = [name for name in names if name.startswith("test_")]
    return f"{tests[0] if tests else 'resnet34'}_{recipe}"
