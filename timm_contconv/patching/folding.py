"""Blocks that fold their branches for inference (`timm.utils.reparameterize_model`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["fold_methods", "folding_blocks", "folds_of_one_size", "refusing_fold"]

METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def folding_blocks(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The blocks around a layer that fold themselves, each with its name."""
    path = name.split(".")[:-1]
    for depth in range(1, len(path) + 1):
        block = model.get_submodule(".".join(path[:depth]))
        if fold_methods(block):
            yield ".".join(path[:depth]), block


def fold_methods(block: nn.Module) -> list[str]:
    """Names of the methods that fold a block."""
    found = {name: getattr(block, name, None) for name in METHODS}
    return [name for name, method in found.items() if callable(method) and not isinstance(method, nn.Module)]


def folds_of_one_size(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Blocks whose fold would be silently wrong with other kernel sizes.

    Such a block keeps the kernel size of the folded convolution in an attribute. It cuts larger kernels off (LCNetV2),
    or pads too little for them (FastViT).

    Args:
        model: it is not changed.
        sizes: the new kernel sizes, by name of the convolution.

    Returns:
        "attribute=value", by name of the block.
    """
    found = {}
    known = [name for name, _ in model.named_modules() if name in sizes]  # without those that the patch adds
    blocks = {path: block for name in known for path, block in folding_blocks(model, name)}
    for path, block in blocks.items():
        convs = {f"{path}.{name}": m for name, m in block.named_modules() if isinstance(m, _ConvNd)}
        now = max(max(conv.kernel_size) for conv in convs.values())
        after = max(max(sizes.get(name, conv.kernel_size)) for name, conv in convs.items())
        for attribute, value in vars(block).items():
            if attribute.endswith("kernel_size") and value == now != after:
                found[path] = f"{attribute}={value}"
    return found


def refusing_fold(block: nn.Module, size: str) -> dict[str, Callable[..., NoReturn]]:
    """Methods that raise an error, to replace those that fold a block, by name."""
    refuse = functools.partial(_refuse, type(block).__name__, size)
    return dict.fromkeys(fold_methods(block), refuse)


def _refuse(block: str, size: str) -> NoReturn:
    raise RuntimeError(
        f"{block}: folds kernels of {size} only, but tcc.patch gave it kernels of another size; use the model unfolded"
    )
