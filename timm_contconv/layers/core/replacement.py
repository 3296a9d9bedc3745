"""ConvReplacement: what patching, training and saving may ask of every layer of this package."""

from __future__ import annotations

import copy
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from .arguments import PADDING_MODES, check_channels, check_choice, check_padding, per_dimension
from .compilation import CompileMode
from .geometry import GeometryOwner
from .plain import PlainConv, kernel_in_size, relative_error, require_weights
from .shown import Quantity, ShownKernels, one_per_output, parameter_quantities

__all__ = [
    "CONV_ATTRIBUTES",
    "FIT_TOLERANCE",
    "ConvReplacement",
    "Init",
    "check_init",
    "live_layers",
    "undecayed_names",
]

Init = Literal["fit", "random"]

#: relative error of a kernel that a fit may have, unless the caller says otherwise
FIT_TOLERANCE = 0.01

#: attributes of `nn.Conv2d` that other code reads; `bias` comes on top
CONV_ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode"),
)


def check_init(init: str) -> None:
    """Raise a ValueError unless init is "fit" or "random"."""
    if init not in ("fit", "random"):
        raise ValueError(f"init={init!r}: expected 'fit' (start from the replaced kernel) or 'random'")


class ConvReplacement(nn.Module, ABC):
    """A layer that can replace a plain convolution.

    It has the attributes of `nn.Conv2d` that other code reads (`in_channels` to `padding_mode`, `bias`). It has
    `weight` only if its kernel is the whole operation.
    """

    #: name of the method, as in recipes
    method: str
    #: number of spatial dimensions
    ndim: ClassVar[int] = 2
    #: whether it can stand in for a dilated convolution
    dilates: ClassVar[bool] = False

    transposed = False

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    bias: Tensor | None

    def _set_arguments(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int] | str,
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str,
    ) -> None:
        """Check the arguments that the layer shares with `nn.Conv2d`, and set them as attributes."""
        self.in_channels, self.out_channels, self.groups = check_channels(in_channels, out_channels, groups)
        self.kernel_size = per_dimension("kernel_size", kernel_size, self.ndim, minimum=1)
        self.stride = per_dimension("stride", stride, self.ndim, minimum=1)
        self.padding_mode = check_choice("padding_mode", padding_mode, PADDING_MODES)
        self.padding = check_padding(padding, self.ndim, padding_mode)
        self.dilation = per_dimension("dilation", dilation, self.ndim, minimum=1)
        self.output_padding = (0,) * self.ndim

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # not __init__: copies and unpickled layers count too
        layer = super().__new__(cls)
        _LIVE[next(_CREATED)] = layer
        return layer

    # ---- geometry

    @property
    @abstractmethod
    def geometry_owner(self) -> GeometryOwner:
        """The module that reads the geometry parameters: the kernel, or the layer itself."""

    @property
    def geometry(self) -> dict[str, nn.Parameter]:
        """The geometry parameters, by name. They have no weight decay; layers may share them."""
        return self.geometry_owner.geometry

    def _require_values(self, x: Tensor) -> None:
        """Refuse to run with geometry on the meta device, which has no values.

        Raises:
            ValueError: x has values.
        """
        for name, value in self.geometry.items():
            if value.is_meta and not x.is_meta:
                raise ValueError(
                    f"{name}: is on the meta device, the input on {x.device}: load the weights first; with accelerate's"
                    " offloading, give it tcc.no_split_modules(model) as preload_module_classes"
                )

    @property
    def undecayed(self) -> list[nn.Parameter]:
        """The parameters that must have no weight decay, besides biases of one dimension: the geometry first."""
        owner = self.geometry_owner
        return [*self.geometry.values(), *(getattr(owner, name) for name in owner.undecayed_names)]

    # ---- in place of a convolution, and back

    @classmethod
    def from_conv(cls, conv: PlainConv, spec: Any, init: Init = "fit", fit_tolerance: float = FIT_TOLERANCE) -> Self:
        """A layer that stands in for `conv`: same channels, stride, bias, output size, device and dtype.

        Args:
            conv: the convolution; it is not changed.
            spec: the method's `LayerSpec`.
            init: "fit" reproduces the kernel of `conv` as well as the layer can, "random" draws all parameters.
            fit_tolerance: relative error of the kernel that is good enough. Settings that the spec leaves open, such
                as the number of elements, are chosen for it.

        Raises:
            ValueError: another init, settings that this convolution does not allow, or no values to fit (meta device).
        """
        check_init(init)
        if init == "random":
            return cls.in_place_of(conv, spec)
        require_weights([conv])
        layer = cls.in_place_of(conv, spec.for_fit([conv], fit_tolerance))
        cls.fit_([layer], [conv], fit_tolerance)
        return layer

    @classmethod
    @abstractmethod
    def in_place_of(cls, conv: PlainConv, spec: Any) -> Self:
        """A layer with the channels, stride, bias, output size, device and dtype of `conv`, drawn at random."""

    @classmethod
    @abstractmethod
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv], tolerance: float = FIT_TOLERANCE) -> None:
        """Let layers reproduce the kernels and biases of plain convolutions, in place, as well as they can.

        Deterministic.

        Args:
            layers: layers of one geometry, each made by `in_place_of`; several share it.
            convs: the convolution that each stands in for.
            tolerance: relative error of each kernel that is good enough; what it leaves free serves a geometry that
                can learn.
        """

    @abstractmethod
    def to_conv(self) -> nn.Module:
        """Plain PyTorch modules with the same output."""

    def to_dense_conv(self) -> nn.Module:
        """One plain convolution, even if `to_conv` gives several. Its output may differ at the borders of images."""
        return self.to_conv()

    def to_conv_like(self, conv: PlainConv) -> PlainConv | None:
        """A copy of `conv`, which this layer stands in for, with this layer's kernel cropped to its size.

        `conv` may be on the meta device. None if more than 1e-5 of the kernel's mass lies outside.
        """
        merged = self.to_dense_conv()
        assert isinstance(merged, PlainConv)
        kernel = kernel_in_size(merged.weight.detach(), conv.weight.shape[2:])
        if kernel is None:
            return None
        plain = copy.deepcopy(conv)
        plain.weight = nn.Parameter(kernel, requires_grad=merged.weight.requires_grad)
        plain.bias = merged.bias
        return plain.train(self.training)

    def fit_error(self, conv: PlainConv) -> float:
        """||kernel - kernel of conv|| / ||kernel of conv||, both centred: how well this layer reproduces `conv`."""
        dense = self.to_dense_conv()
        assert isinstance(dense.weight, Tensor)
        return relative_error(dense.weight, conv.weight)

    # ---- training

    def constrain_(self) -> None:
        """Clamp parameters, in place, into the range that the method needs after an optimiser step."""

    def penalty(self) -> Tensor | None:
        """The method's regulariser, a scalar; None if it has none."""
        return None

    def compile_construction(self, mode: CompileMode) -> None:
        """Whether kernels are constructed through torch.compile: "auto" (on CUDA only), True or False."""

    # ---- reports

    def summary(self) -> str:
        """The layer in a few words."""
        return f"{type(self).__name__} {'×'.join(map(str, self.kernel_size))}"

    def receptive_field(self) -> tuple[int, ...]:
        """Pixels of the input that an output depends on, per spatial dimension."""
        return self.kernel_size

    def highest_frequency(self) -> float | None:
        """The highest frequency of the kernel in cycles per pixel; pixels can represent up to 0.5.

        None if the method's kernels are not band-limited, or have no values (meta device).
        """
        return None

    def shown_kernels(self) -> ShownKernels:
        """What pictures show of the kernels: `to_dense_conv()`'s, unless a method has more to show."""
        dense = self.to_dense_conv()
        conv = dense[-1] if isinstance(dense, nn.Sequential) else dense  # causal ones have their padding before them
        assert isinstance(conv, PlainConv)
        return ShownKernels(one_per_output(conv.weight.detach()))

    def shown_quantities(self) -> tuple[Quantity, ...]:
        """Numbers about the geometry whose distributions pictures show: the parameters, unless a method says more."""
        return parameter_quantities(self.geometry)

    @abstractmethod
    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds for one sample with an output of `output_size` pixels."""

    def published_multiply_adds(self, output_size: Sequence[int]) -> int:
        """`multiply_adds` as the method's paper counts; this implementation may need fewer."""
        return self.multiply_adds(output_size)

    # ---- saving and copying

    def unsaved_setting(self) -> str | None:
        """A setting that was changed after the layer was built, and that a saved model loses; None if there is none."""
        return None

    def reset_setting(self) -> None:
        """Undo what `unsaved_setting` names, if it prevents merging the layer."""

    def __prepare_scriptable__(self) -> Self:
        raise NotImplementedError(
            f"{type(self).__name__}: torch.jit.script can't compile the construction of kernels; script"
            " tcc.merge(model), or use torch.jit.trace or torch.export"
        )

    def _replicate_for_data_parallel(self) -> Self:
        raise NotImplementedError(
            f"{type(self).__name__}: nn.DataParallel does not copy the parameters of constructed kernels; use"
            " DistributedDataParallel, or tcc.merge(model) to evaluate"
        )


def undecayed_names(model: nn.Module) -> list[str]:
    """Names of the model's parameters that must have no weight decay because a method says so."""
    layers = [module for module in model.modules() if isinstance(module, ConvReplacement)]
    exempt = {id(parameter) for layer in layers for parameter in layer.undecayed}
    return [name for name, parameter in model.named_parameters() if id(parameter) in exempt]


_CREATED = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, ConvReplacement] = weakref.WeakValueDictionary()


def live_layers() -> list[ConvReplacement]:
    """Every complete layer of this process, in order of creation, which is the same in all processes of a job."""
    return [layer for layer in _LIVE.values() if getattr(layer, "geometry", None) is not None]
