"""Layers under torch.fx: each layer is one node of the graph, which includes the construction of its kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["as_node", "is_traced"]


def is_traced(x: Any) -> bool:
    """Whether x is a symbol of torch.fx, whose shape and values are not known."""
    return isinstance(x, Proxy)


def as_node(layer: nn.Module, x: Any, **arguments: Any) -> Tensor:
    """The call of a layer as a node of the graph that is being traced.

    Raises:
        ValueError: the layer is the root of the trace.
    """
    if layer is x.tracer.root:
        raise ValueError(
            f"root: a {type(layer).__name__} is one node of a graph and can't be traced alone; trace a module that"
            " holds it, as nn.Sequential(layer)"
        )
    target = x.tracer.path_of_module(layer)
    node: Any = x.tracer.create_proxy("call_module", target, (x,), arguments)
    return node
