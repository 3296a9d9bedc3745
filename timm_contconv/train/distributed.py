"""Whole parameters of layers that FSDP2 (`fully_shard`) has sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement

__all__ = ["edit_whole_parameters", "whole_parameters"]


@contextlib.contextmanager
def whole_parameters(layers: Sequence[ConvReplacement]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gather sharded geometry parameters, so that layers compute with whole ones; gradients flow into the shards.

    A method's formula needs the whole parameter: a shard of DCLS positions holds only some of the axes. Every process
    of the job has to call this with the same layers.

    Args:
        layers: the layers whose geometry, own or shared, is gathered.

    Yields:
        (shard, whole parameter), each once.
    """
    places = [
        (module, name, parameter)
        for layer in layers
        for module in dict.fromkeys((layer.geometry_owner, layer.geometry_owner.geometry_home))
        for name, parameter in module._parameters.items()
        if parameter is not None and _is_shard(parameter)
    ]
    shards = {id(shard): shard for _, _, shard in places}
    whole = {key: shard.full_tensor() for key, shard in shards.items()}  # type: ignore[attr-defined]
    try:
        for module, name, shard in places:
            module._parameters[name] = whole[id(shard)]
        yield [(shard, whole[key]) for key, shard in shards.items()]
    finally:
        for module, name, shard in places:
            module._parameters[name] = shard


@contextlib.contextmanager
def edit_whole_parameters(layers: Sequence[ConvReplacement]) -> Iterator[None]:
    """Like `whole_parameters`, for changes in place: at the end the values are copied into the shards."""
    with torch.no_grad(), whole_parameters(layers) as gathered:
        yield
        for shard, whole in gathered:
            shard.to_local().copy_(_shard_like(whole, shard).to_local())  # type: ignore[attr-defined]


def _is_shard(parameter: nn.Parameter) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # takes a while to import

    return isinstance(parameter, DTensor)


def _shard_like(whole: Tensor, shard: Tensor) -> Tensor:
    """Shard a tensor, equal on all processes, like `shard`; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)  # type: ignore[attr-defined]
