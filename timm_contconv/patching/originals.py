"""The original of a patched model, and images to compare the two on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement
from ..layers.core.plain import PlainConv
from .record import PatchRecord

__all__ = ["first_images", "first_tensor", "in_eval_mode", "original_convs", "run"]


def original_convs(record: PatchRecord, original: nn.Module) -> dict[str, PlainConv]:
    """The convolutions of the original model that a patch replaced, by name.

    Raises:
        TypeError: original is not a module.
        ValueError: it is patched itself, or lacks such a convolution.
    """
    if not isinstance(original, nn.Module):
        raise TypeError(f"original={original!r}: expected the model before its patch")
    modules = dict(original.named_modules())
    for name, module in modules.items():
        if isinstance(module, ConvReplacement):
            raise ValueError(
                f"original: {name or 'it'} is a {type(module).__name__}; expected the model before its patch: keep a"
                " copy.deepcopy of it"
            )
    convs: dict[str, PlainConv] = {}
    for name, conv in record.replaced.items():
        own = modules.get(name)
        if not isinstance(own, PlainConv) or type(own) is not type(conv) or own.weight.shape != conv.weight.shape:
            raise ValueError(
                f"original: {name} is {own}, expected {conv}, which the patch replaced; give the model that was patched"
            )
        convs[name] = own
    return convs


def first_images(batches: Tensor | Iterable[Any], count: int, like: Tensor, name: str) -> Tensor:
    """The first images of batches, as one tensor on the device of `like`.

    Args:
        batches: (N, C, H, W), or an iterable of such tensors or of tuples that begin with one, as a DataLoader gives.
        count: at most.
        like: a parameter of the model.
        name: of the argument, for messages.

    Raises:
        TypeError: a batch is neither a tensor nor begins with one.
        ValueError: there is no image, or images differ in size, have another dtype than the model, or are not finite.
    """
    found: list[Tensor] = []
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(images, Tensor):
            raise TypeError(f"{name}: a batch is a {type(images).__name__}; expected tensors (N, C, H, W)")
        if images.ndim < 3:
            raise ValueError(f"{name}: a batch has shape {tuple(images.shape)}; expected (N, C, *size)")
        if images.dtype != like.dtype:
            raise ValueError(f"{name}: images are {images.dtype}, the model is {like.dtype}; convert one of them")
        if found and images.shape[1:] != found[0].shape[1:]:
            sizes = f"{tuple(found[0].shape[1:])} and {tuple(images.shape[1:])}"
            raise ValueError(f"{name}: images of sizes {sizes}; expected one size")
        if not images.isfinite().all():
            raise ValueError(f"{name}: a batch holds NaN or infinity; expected finite numbers")
        found.append(images[: count - sum(map(len, found))])
        if sum(map(len, found)) >= count:
            break
    if not sum(map(len, found)):
        raise ValueError(f"{name}: no images; expected at least one")
    return torch.cat(found).to(like.device)


@contextlib.contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode, whose modules get their own modes back."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """The first tensor that the model returns.

    Raises:
        ValueError: the model can't take images of this shape.
    """
    try:
        return first_tensor(model(images))
    except (AssertionError, IndexError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name}: the model can't take images of shape {tuple(images.shape[1:])}: {reason}") from error


def first_tensor(value: Any) -> Tensor:
    """Of what a model returns: logits, the last feature map of a feature extractor, the first field of another."""
    while not isinstance(value, Tensor):
        if isinstance(value, list):
            value = value[-1]
        else:
            value = value[0] if isinstance(value, tuple) else next(v for v in value.values() if v is not None)
    return value
