"""Layers under torch.fx: each stays one node of the graph, with its parameters and its construction inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["as_node", "is_traced"]


def is_traced(x: Any) -> bool:
    """Whether x is a symbol of torch.fx, whose shape and values are not known."""
    return isinstance(x, Proxy)


def as_node(layer: nn.Module, x: Any, **arguments: Any) -> Tensor:
    """The call of a layer as a node of the graph that is being traced."""
    target = x.tracer.path_of_module(layer)
    node: Any = x.tracer.create_proxy("call_module", target, (x,), arguments)
    return node
