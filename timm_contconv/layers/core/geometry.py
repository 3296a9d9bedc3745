"""Geometry: the parameters that say where a kernel reaches. Several layers can share one set of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

__all__ = ["GeometryOwner", "share_geometry"]


class GeometryOwner(nn.Module):
    """A module with geometry parameters: its own, or a set that it shares with others.

    A subclass registers the parameters under `geometry_names` and reads them from `geometry`.
    """

    #: names of the geometry parameters
    geometry_names: tuple[str, ...] = ()
    #: names of other parameters without weight decay: several biases in one tensor, filters' frequencies and widths
    undecayed_names: tuple[str, ...] = ()
    #: learning rates relative to that of the weights, by name, as in the method's paper or release; 1 where not named
    geometry_lr_scale: ClassVar[Mapping[str, float]] = {}
    #: whether the method's penalty depends on the geometry alone, so that layers that share it have one
    penalises_geometry: ClassVar[bool] = False

    @property
    def geometry(self) -> dict[str, nn.Parameter]:
        """The geometry parameters by name; modules that share them return the shared ones."""
        home = self.geometry_home
        return {name: getattr(home, name) for name in self.geometry_names}

    @property
    def geometry_home(self) -> nn.Module:
        """The module that registers the geometry parameters."""
        home: nn.Module = self.__dict__.get("_shared_geometry", self)
        return home


def share_geometry(owners: Sequence[GeometryOwner]) -> nn.ParameterDict:
    """Let several modules use one set of geometry parameters, that of the first.

    Returns:
        The set. The owners only refer to it. The caller registers it on a module that holds all the owners. Then it is
        in `state_dict()` and `parameters()` once, and FSDP, which gathers parameters by module, has it when an owner
        runs.

    Raises:
        ValueError: the owners' parameter shapes differ; then nothing is changed.
    """
    geometry = owners[0].geometry
    for owner in owners[1:]:
        for key, value in geometry.items():
            if owner.geometry[key].shape != value.shape:
                raise ValueError(
                    f"{key} has shape {tuple(owner.geometry[key].shape)} in one layer and {tuple(value.shape)} in"
                    " another: layers share geometry only where the shapes are equal"
                )
    shared = nn.ParameterDict(geometry)
    for owner in owners:
        for key in geometry:
            del owner._parameters[key]
        owner.__dict__["_shared_geometry"] = shared  # past nn.Module.__setattr__: a reference, not a registration
    return shared
