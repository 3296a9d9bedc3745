"""ConvReplacement: what patching, training and saving may ask of every layer of this package."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

__all__ = ["ConvReplacement", "PlainConv", "share_geometry"]

PlainConv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvReplacement(nn.Module):
    """A layer that can stand where a plain convolution stood."""

    method: ClassVar[str]
    #: learning rate of the geometry parameters relative to that of the weights
    geometry_lr_scale: ClassVar[float] = 1.0

    #: parameters that say where a kernel reaches (positions, widths, radii, masks): never decayed. Registered on
    #: the layer, unless `share_geometry` registered one set for several layers elsewhere.
    geometry: nn.ParameterDict

    @classmethod
    @abstractmethod
    def from_conv(cls, conv: PlainConv, spec: Any, init: Literal["fit", "random"] = "random") -> Self:
        """A layer that stands in for `conv`: same channels, stride, bias, output size, device and dtype."""

    @abstractmethod
    def to_conv(self) -> nn.Module:
        """Plain PyTorch modules with the same output."""

    def to_dense_conv(self) -> nn.Module:
        """One plain convolution, also where `to_conv` gives several; it may differ at the borders of images."""
        return self.to_conv()

    @abstractmethod
    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds for one sample with an output of `output_size` pixels."""

    def published_multiply_adds(self, output_size: Sequence[int]) -> int:
        """`multiply_adds` as the method's paper counts, where this implementation needs fewer."""
        return self.multiply_adds(output_size)

    def constrain_(self) -> None:
        """Clamp parameters, in place, into the range that the method needs after an optimiser step."""

    def penalty(self) -> Tensor | None:
        """The method's regulariser, a scalar, or None where it has none."""
        return None


def share_geometry(layers: Sequence[ConvReplacement], home: nn.Module, name: str) -> None:
    """Let several layers use one set of geometry parameters, that of the first.

    The set is registered once, on `home` under `name`, so it stands once in `state_dict()` and `parameters()`;
    the layers hold references. `home` should hold all the layers, so that wrappers that manage parameters by
    module (FSDP) have the set at hand whenever one of the layers runs.

    Raises:
        ValueError: the layers' parameter shapes differ.
    """
    geometry = layers[0].geometry
    for layer in layers[1:]:
        for key, value in geometry.items():
            if layer.geometry[key].shape != value.shape:
                raise ValueError(
                    f"{key} has shape {tuple(layer.geometry[key].shape)} in one layer and {tuple(value.shape)} in"
                    " another: layers share geometry only where the shapes are equal"
                )
    for layer in layers:
        del layer._modules["geometry"]
        layer.__dict__["geometry"] = geometry  # past nn.Module.__setattr__: a reference, not a registration
    home.add_module(name, geometry)
