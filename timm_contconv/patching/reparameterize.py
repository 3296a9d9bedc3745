"""Blocks that fold their branches into one convolution for inference: which of their convolutions may be replaced.

timm's `reparameterize_model` calls methods of the model's own blocks. They read kernels, sizes and paddings off
convolutions, and some take a size for granted. So a copy of the block is tried with the new layers in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers import ConvReplacement
from .swap import copy_without_hooks, swap

__all__ = ["blocks_that_fold", "folding_obstacle", "folding_obstacles"]

Module = TypeVar("Module", bound=nn.Module)

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
TOLERANCE = 1e-4  # relative, in float32: the blocks make their folded convolutions in the default dtype
PIXELS = 32


def folding_obstacles(
    model: nn.Module,
    layers: Mapping[str, ConvReplacement],
    foldable: Collection[str] = (),
    unfoldable: Collection[str] = (),
) -> dict[str, str | None]:
    """Why each layer would keep its block from re-parameterising itself, None where it would not.

    Args:
        model: it is not changed.
        layers: what would stand in it, by name.
        foldable, unfoldable: names of which an earlier trial told; blocks with others are tried.

    Returns:
        By name; layers that stand in no such block are left out.
    """
    obstacles: dict[str, str | None] = {}
    folds: dict[type[nn.Module], bool] = {}  # once for blocks of a class, which have their methods in common
    for name, inside in blocks_that_fold(model, layers).items():
        block = model.get_submodule(name)
        if {*foldable, *unfoldable}.issuperset(inside):
            reason = f"its {type(block).__name__} could no longer re-parameterise itself"
            obstacles |= {key: reason if key in unfoldable else None for key in inside}
        else:
            obstacle = folding_obstacle(block, {key.removeprefix(f"{name}."): layers[key] for key in inside})
            if obstacle is not None and type(block) not in folds:
                folds[type(block)] = _may_fold(block)
            obstacles |= dict.fromkeys(inside, obstacle if folds.get(type(block)) else None)
    return obstacles


def blocks_that_fold(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The outermost module that re-parameterises itself around each named module, with the names inside of it."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        path = name.split(".")[:-1]
        for depth in range(1, len(path) + 1):
            block = ".".join(path[:depth])
            if any(_needs_no_argument(getattr(model.get_submodule(block), method, None)) for method in METHODS):
                blocks.setdefault(block, []).append(name)
                break
    return blocks


def _needs_no_argument(method: Any) -> bool:
    """Whether this is a method that `reparameterize_model` could call, rather than a submodule or one of its name."""
    if not callable(method) or isinstance(method, nn.Module):
        return False
    try:
        parameters = inspect.signature(method).parameters.values()
    except ValueError:  # compiled functions may have none
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def folding_obstacle(block: nn.Module, layers: Mapping[str, ConvReplacement]) -> str | None:
    """Why a block could no longer re-parameterise itself with these layers, or None where it can.

    Args:
        block: it is not changed; on the meta device a copy is tried with values of its own.
        layers: what would stand in it, by name within it.
    """
    _, outcome = _trial(block, layers)
    if _is_success(outcome):
        return None
    kind = type(block).__name__
    if isinstance(outcome, Exception):
        return f"its {kind} could no longer re-parameterise itself ({type(outcome).__name__})"
    return f"its {kind} would re-parameterise itself to another output"


def _may_fold(block: nn.Module) -> bool:
    """Whether a block as it is folds to the same output, or can't be run on its own, so that this can't be told."""
    runs, outcome = _trial(block, {})
    return _is_success(outcome) or not runs


def _trial(block: nn.Module, layers: Mapping[str, ConvReplacement]) -> tuple[bool, float | Exception]:
    """Whether a copy of the block with these layers runs, and its relative error once folded or what failed."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        return _seeded_trial(block, layers)


def _seeded_trial(block: nn.Module, layers: Mapping[str, ConvReplacement]) -> tuple[bool, float | Exception]:
    runs = False
    try:
        trial = _on_cpu(block)
        swap(trial, {name: _on_cpu(layer) for name, layer in layers.items()})
        _stir(trial)
        whole = nn.Sequential(trial).eval()
        first = next(module for module in block.modules() if isinstance(module, _ConvNd))
        images = torch.randn(1, first.in_channels, *[PIXELS] * len(first.kernel_size))
        expected = whole(images)
        runs = True
        folded = reparameterize_model(whole, inplace=True)(images)
        error = torch.linalg.vector_norm(folded - expected) / torch.linalg.vector_norm(expected)
        return runs, error.item()
    except Exception as failure:  # whatever a stranger's block makes of it
        return runs, failure


def _is_success(outcome: float | Exception) -> bool:
    return isinstance(outcome, float) and outcome < TOLERANCE


def _on_cpu(module: Module) -> Module:
    """A copy in float32 on the CPU; one of the meta device gets values as its modules draw them."""
    shadow = copy_without_hooks(module)
    tensors = (*shadow.parameters(), *shadow.buffers())
    if any(tensor.is_meta for tensor in tensors):
        _materialise(shadow)
    return shadow.to("cpu", torch.float32)


def _materialise(module: nn.Module) -> None:
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.fill_(int(tensor.is_floating_point()))
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()


def _stir(block: nn.Module) -> None:
    """Change parameters and running statistics, so that nothing is hidden behind a 0 or a 1."""
    for parameter in block.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.add_(torch.randn_like(module.running_mean))
            module.running_var.add_(torch.rand_like(module.running_var))
