"""ConvReplacement: what patching, training and saving may ask of every layer of this package."""

from __future__ import annotations

import copy
import itertools
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .once import compute_once

__all__ = [
    "ConvReplacement",
    "Init",
    "PlainConv",
    "centred",
    "check_init",
    "copy_bias_",
    "kernels_inside",
    "live_layers",
    "margin",
    "relative_error",
    "require_weights",
    "share_geometry",
]

PlainConv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Init = Literal["fit", "random"]

NEGLIGIBLE = 1e-5  # part of a kernel's mass: what an exact warm start may leave outside of the old kernel


def check_init(init: str) -> None:
    """Refuse an init that there is not.

    Raises:
        ValueError: names what is allowed.
    """
    if init not in ("fit", "random"):
        raise ValueError(f"init={init!r}: expected 'fit' (start from the replaced kernel) or 'random'")


class ConvReplacement(nn.Module):
    """A layer that can stand where a plain convolution stood."""

    method: ClassVar[str]
    #: learning rate of the geometry parameters relative to that of the weights
    geometry_lr_scale: ClassVar[float] = 1.0

    #: parameters that say where a kernel reaches (positions, widths, radii, masks): never decayed. Registered on
    #: the layer, unless `share_geometry` registered one set for several layers elsewhere.
    geometry: nn.ParameterDict

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # not __init__: copies and unpickled layers count too
        layer = super().__new__(cls)
        _LIVE[next(_CREATED)] = layer
        return layer

    @classmethod
    def from_conv(cls, conv: PlainConv, spec: Any, init: Init = "fit") -> Self:
        """A layer that stands in for `conv`: same channels, stride, bias, output size, device and dtype.

        Args:
            conv: the convolution; it is not changed.
            spec: the method's `LayerSpec`.
            init: "fit" reproduces the kernel of `conv` as well as the layer can, "random" draws all parameters.

        Raises:
            ValueError: init is another; the settings do not go with this convolution, or it has no weights to fit
                (meta device).
        """
        check_init(init)
        layer = cls.in_place_of(conv, spec)
        if init == "fit":
            cls.fit_([layer], [conv])
        return layer

    @classmethod
    @abstractmethod
    def in_place_of(cls, conv: PlainConv, spec: Any) -> Self:
        """A layer with the channels, stride, bias, output size, device and dtype of `conv`, drawn at random."""

    @classmethod
    @abstractmethod
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv]) -> None:
        """Let layers reproduce the kernels and biases of plain convolutions, in place, as well as they can.

        Deterministic. Where the method can be exact it is.

        Args:
            layers: layers of one geometry, shared where there are several, each made by `in_place_of`.
            convs: the convolution that each stands in for.
        """

    def fit_error(self, conv: PlainConv) -> float:
        """||kernel - kernel of conv|| / ||kernel of conv||, both centred: how well this layer reproduces `conv`."""
        dense = self.to_dense_conv()
        assert isinstance(dense.weight, Tensor)
        return relative_error(dense.weight, conv.weight)

    @abstractmethod
    def to_conv(self) -> nn.Module:
        """Plain PyTorch modules with the same output."""

    def to_dense_conv(self) -> nn.Module:
        """One plain convolution, also where `to_conv` gives several; it may differ at the borders of images."""
        return self.to_conv()

    def to_conv_like(self, conv: PlainConv) -> PlainConv | None:
        """A copy of `conv`, which this layer stands in for, with this layer's kernel cropped to its size.

        `conv` may be on the meta device. None where more than 1e-5 of the kernel's mass lies outside.
        """
        merged = self.to_dense_conv()
        assert isinstance(merged, PlainConv)
        kernel = _fitting(merged.weight.detach(), conv.weight.shape[2:])
        if kernel is None:
            return None
        plain = copy.deepcopy(conv)
        plain.weight = nn.Parameter(kernel, requires_grad=merged.weight.requires_grad)
        plain.bias = merged.bias
        return plain.train(self.training)

    def receptive_field(self) -> tuple[int, ...]:
        """Pixels of the input that an output depends on, per spatial dimension."""
        sizes: tuple[int, ...] = self.kernel_size  # type: ignore[assignment]
        return sizes

    def highest_frequency(self) -> float | None:
        """The highest frequency of the kernel in cycles per pixel, of which pixels can show 0.5.

        None for a method whose kernels are not band-limited, or without values.
        """
        return None

    @abstractmethod
    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds for one sample with an output of `output_size` pixels."""

    def published_multiply_adds(self, output_size: Sequence[int]) -> int:
        """`multiply_adds` as the method's paper counts, where this implementation needs fewer."""
        return self.multiply_adds(output_size)

    def _replicate_for_data_parallel(self) -> Self:
        raise NotImplementedError(
            f"{type(self).__name__}: nn.DataParallel does not copy parameters that layers construct kernels from; use"
            " DistributedDataParallel, or tcc.merge(model) to evaluate"
        )

    def unsaved_setting(self) -> str | None:
        """What was set on the layer after it was built, which a saved model does not hold; None where nothing was."""
        return None

    def reset_setting(self) -> None:
        """Undo what `unsaved_setting` names, where it keeps the layer from being merged."""

    def constrain_(self) -> None:
        """Clamp parameters, in place, into the range that the method needs after an optimiser step."""

    def penalty(self) -> Tensor | None:
        """The method's regulariser, a scalar, or None where it has none."""
        return None


_CREATED = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, ConvReplacement] = weakref.WeakValueDictionary()


def live_layers() -> list[ConvReplacement]:
    """Every whole layer that there is, in order of creation: the same on every process of a distributed job."""
    return [layer for layer in _LIVE.values() if getattr(layer, "geometry", None) is not None]


def require_weights(convs: Sequence[PlainConv]) -> None:
    """Refuse convolutions that have no values to start from.

    Raises:
        ValueError: one is on the meta device, or holds NaN or infinity.
    """
    if any(conv.weight.is_meta for conv in convs):
        raise ValueError("init='fit': the convolutions are on the meta device and hold no kernels; use init='random'")
    for conv in convs:
        if wrong := int((~conv.weight.detach().isfinite()).sum()):
            raise ValueError(
                f"init='fit': {wrong} of {conv.weight.numel()} values of {conv} are NaN or infinite, expected finite"
                " numbers; use init='random'"
            )


@torch.no_grad()
def copy_bias_(layer: nn.Module, conv: PlainConv) -> None:
    """Give a layer the bias of a convolution, where both have one."""
    if conv.bias is not None and isinstance(layer.bias, Tensor):
        layer.bias.copy_(conv.bias)


def margin(small: int, large: int) -> int:
    """Pixels of a larger kernel before a smaller one about the same centre; negative where the "larger" is smaller.

    The centre of an even kernel is where "same" padding has it.
    """
    return (large - 1) // 2 - (small - 1) // 2


def centred(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A kernel about the same centre in another size, zeros around it or its rim cut off: (..., *K) to (..., *size)."""
    padding: list[int] = []
    for old, new in reversed(list(zip(kernel.shape[-len(size) :], size, strict=True))):
        padding += [margin(old, new), new - old - margin(old, new)]
    return F.pad(kernel, padding)


def kernels_inside(convs: Sequence[PlainConv], size: Sequence[int]) -> list[Tensor]:
    """The parts of convolutions' kernels that lie in a kernel of `size`, all in the size that the largest needs."""
    sizes = [max(conv.kernel_size[d] for conv in convs) for d in range(len(size))]
    common = [min(old, new) for old, new in zip(sizes, size, strict=True)]
    return [centred(conv.weight.detach(), common) for conv in convs]


def _fitting(kernel: Tensor, size: Sequence[int]) -> Tensor | None:
    """The kernel in another size, (..., *size), or None where something lies outside of it."""
    cropped = centred(kernel, size)
    mass = kernel.abs().sum(dtype=torch.float64)
    outside = mass - cropped.abs().sum(dtype=torch.float64)
    return cropped.clone() if outside <= NEGLIGIBLE * mass else None


@torch.no_grad()
def relative_error(kernel: Tensor, target: Tensor) -> float:
    """||kernel - target|| / ||target||, in float64, both centred in the larger of the two sizes along each axis."""
    size = [max(a, b) for a, b in zip(kernel.shape[2:], target.shape[2:], strict=True)]
    wanted = centred(target.double(), size)
    distance = torch.linalg.vector_norm(centred(kernel.double(), size) - wanted)
    return (distance / torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(torch.float64).tiny)).item()


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
    if home is not layers[0]:
        compute_once(home)
