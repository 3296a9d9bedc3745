"""KernelConv1d, 2d and 3d: like `nn.Conv1d`, 2d and 3d, with a weight that a kernel constructs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...ops import conv as convolve
from .compilation import CompileMode, check_compile_mode
from .geometry import GeometryOwner
from .kept import Kept
from .kernel import Kernel, Margins
from .padding import pad_image, sides_of
from .plain import PlainConv, copy_bias_, kernels_inside, plain_arguments, plain_conv, require_weights
from .replacement import FIT_TOLERANCE, ConvReplacement
from .shown import Quantity, ShownKernels, one_per_output
from .spec import KernelSpec
from .tracing import as_node, is_traced

__all__ = ["KernelConv", "KernelConv1d", "KernelConv2d", "KernelConv3d"]


class KernelConv(ConvReplacement):
    """A convolution whose weight is constructed by a `Kernel`.

    Args:
        in_channels: C_in, a multiple of `groups`.
        out_channels: C_out, a multiple of `groups`.
        kernel_size: size of the constructed kernel, in pixels; an int or one per spatial dimension.
        stride: step of the convolution, in pixels.
        padding: pixels added on both sides, "valid" (none), "same" (the output has ceil(input / stride) pixels; for
            stride 1 this is PyTorch's "same", for larger strides timm's `Conv2dSame`), or in 1-D "causal" (zeros before
            the sequence, so that output i depends on inputs 0..i). Default: 0, unless the layer says otherwise.
        dilation: pixels between neighbours of the kernel, as in `nn.Conv2d`; the kernel's geometry is in its own
            pixels. To reach further, a larger kernel_size is the better way.
        groups: blocked connections from input to output channels.
        bias: adds a learnable bias of shape (C_out,).
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device, dtype: of the parameters.
        spec: settings of the kernel, instead of `**settings`.
        compile: "auto" compiles the kernel construction on CUDA and stays eager on the CPU, True compiles everywhere,
            False nowhere.
        **settings: settings of the kernel, as the fields of the layer's spec.

    Parameters:
        kernel.*: those of the kernel.
        bias: (C_out,).

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.
    """

    dilates = True
    #: `**settings` are fields of this class; None for a layer that takes any spec
    spec_class: ClassVar[type[KernelSpec] | None] = None
    default_padding: ClassVar[int | str] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: KernelSpec | None = None,
        compile: CompileMode = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        padding = self.default_padding if padding is None else padding
        self._set_arguments(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        if spec is None:
            spec = self._spec_of(settings)
        elif settings:
            raise TypeError(f"{', '.join(settings)}: expected no settings beside spec, which holds them")
        self.method = spec.method
        channels, causal = (self.out_channels, self.in_channels // self.groups), self.padding == "causal"
        self.kernel: Kernel = spec.kernel(spec, *channels, self.kernel_size, causal=causal, device=device, dtype=dtype)
        self.compile_construction(compile)
        self._kept: Kept[tuple[Tensor, Margins | None]] = Kept()
        self.reset_parameters()

    def _spec_of(self, settings: dict[str, Any]) -> KernelSpec:
        if self.spec_class is None:
            raise TypeError(f"spec=None: expected the settings of a kernel; {type(self).__name__} has none of its own")
        spec = self.spec_class.of(kernel_size=1, **settings)  # the spec's limit on sizes is for strangers' files
        return spec.model_copy(update={"kernel_size": self.kernel_size})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the method's paper does."""
        self.kernel.reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -self.kernel.bias_bound, self.kernel.bias_bound)

    # ---- the kernel

    @property
    def weight(self) -> Tensor:
        """The dense kernel, (C_out, C_in/groups, *kernel_size), as `nn.Conv2d.weight` would hold it; differentiable.

        An edit of it does not change the layer. On the CPU, outside training and without gradients, the kernel is
        constructed once, and again when the parameters' values have changed. Otherwise every access constructs it.
        """
        kernel, margins = self._cropped_kernel()
        whole = kernel if margins is None else pad_image(kernel, margins, "zeros")
        return whole if whole.requires_grad else whole.clone()

    def _cropped_kernel(self) -> tuple[Tensor, Margins | None]:
        """The dense kernel without its margins, and the margins."""
        if self.training:
            return self.kernel(), self.kernel.margins
        return self._kept.get(tuple(self.kernel.sources().values()), self._look_and_construct)

    def _look_and_construct(self) -> tuple[Tensor, Margins | None]:
        if next(self.kernel.parameters()).device.type == "cpu":  # on an accelerator it would wait for the device
            self.kernel.look()
        return self.kernel(), self.kernel.margins

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise AttributeError("weight: it is constructed and can't be set; to_conv() gives a layer where it can")
        super().register_parameter(name, param)

    def compile_construction(self, mode: CompileMode) -> None:
        self.kernel.compile_mode = check_compile_mode(mode)

    @property
    def geometry_owner(self) -> GeometryOwner:
        return self.kernel

    # ---- the convolution

    def forward(self, x: Tensor, shared: Sequence[Tensor] = ()) -> Tensor:
        """Convolve x, (N, C_in, *size) or (C_in, *size), with the constructed kernel.

        `shared` is what torch.fx graphs pass, so that they hold shared geometry; it is not used.
        """
        if is_traced(x):
            return as_node(self, x)
        self._require_values(x)
        kernel, margins = self._cropped_kernel()
        x, padding = self._pad(x, margins)
        return convolve(x, kernel, self.bias, self.stride, padding, self.groups, self.dilation)

    def _pad(self, x: Tensor, margins: Margins | None) -> tuple[Tensor, tuple[int, ...]]:
        """Pad where the convolution can't (modes other than zeros, uneven sides); return x and the padding left."""
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        sides = sides_of(self.padding, reach, self.stride, x.shape[-self.ndim :])
        cut = [(a * d, b * d) for (a, b), d in zip(margins or ((0, 0),) * self.ndim, self.dilation, strict=True)]
        if self.padding_mode != "zeros":
            x, sides = pad_image(x, sides, self.padding_mode), [(0, 0)] * self.ndim
        sides = [(a - before, b - after) for (a, b), (before, after) in zip(sides, cut, strict=True)]
        if all(before == after >= 0 for before, after in sides):
            return x, tuple(before for before, _ in sides)
        return pad_image(x, sides, "zeros"), (0,) * self.ndim

    # ---- in place of a convolution, and back

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: KernelSpec) -> Self:
        """A layer in place of `conv`, with the kernel of `spec`.

        Raises:
            ValueError: the kernel can't be centred on the old one, or spec lacks a setting.
        """
        return cls(**plain_arguments(conv, spec.sizes(cls.ndim)), spec=spec)

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv], tolerance: float = FIT_TOLERANCE) -> None:
        require_weights(convs)
        kernels = [layer.kernel for layer in layers]
        type(kernels[0]).fit_(kernels, kernels_inside(convs, layers[0].kernel_size), tolerance)
        for layer, conv in zip(layers, convs, strict=True):
            copy_bias_(layer.bias, conv)

    def to_conv(self) -> nn.Module:
        """The plain convolution (`nn.Conv1d/2d/3d`, or timm's `Conv2dSame`) with the same output.

        Zero borders of its kernel are cut off. With causal padding an `nn.ConstantPad1d` comes before it.
        """
        self.kernel.look()
        cut = self.kernel.margins or ((0, 0),) * self.ndim
        if self.padding == "causal":
            (before, after), size, step = cut[0], self.kernel_size[0], self.dilation[0]
            pad = nn.ConstantPad1d(((size - 1 - before) * step, -after * step), 0.0)
            return nn.Sequential(pad, self._plain_conv(self.kernel(), (0,))).train(self.training)
        padding, even = self._even_cut(cut)
        rest = [(before - e, after - e) for (before, after), e in zip(cut, even, strict=True)]
        return self._plain_conv(pad_image(self.kernel(), rest, "zeros"), padding).train(self.training)

    def _plain_conv(self, kernel: Tensor, padding: Sequence[int] | str) -> PlainConv:
        conv = plain_conv(
            kernel, self.bias, stride=self.stride, padding=padding, dilation=self.dilation, groups=self.groups,
            padding_mode=self.padding_mode,
        )  # fmt: skip
        conv.weight.requires_grad_(any(value.requires_grad for value in self.kernel.sources().values()))
        return conv

    def _even_cut(self, cut: Margins) -> tuple[str | tuple[int, ...], list[int]]:
        """The padding of a plain convolution with this kernel, and the pixels cut off on both sides, per dimension."""
        if self.padding == "same":
            even = [0 if max(self.stride) > 1 else min(side) for side in cut]  # with a stride it depends on the image
            return "same", even
        assert not isinstance(self.padding, str)
        even = [min(*side, p // d) for side, p, d in zip(cut, self.padding, self.dilation, strict=True)]
        return tuple(p - e * d for p, e, d in zip(self.padding, even, self.dilation, strict=True)), even

    # ---- training, reports

    def constrain_(self) -> None:
        self.kernel.constrain_()

    def penalty(self) -> Tensor | None:
        return self.kernel.penalty()

    def summary(self) -> str:
        return f"{super().summary()}{self.kernel.summary()}"

    def highest_frequency(self) -> float | None:
        return self.kernel.highest_frequency()

    @torch.no_grad()
    def shown_kernels(self) -> ShownKernels:
        return ShownKernels(one_per_output(self.weight), elements=self.kernel.shown_elements())

    def shown_quantities(self) -> tuple[Quantity, ...]:
        return self.kernel.shown_quantities()

    def receptive_field(self) -> tuple[int, ...]:
        """Extent of the kernel without its margins."""
        return tuple((size - 1) * d + 1 for size, d in zip(self._inner_size(), self.dilation, strict=True))

    def _inner_size(self) -> list[int]:
        """Pixels of the kernel without its margins."""
        cut = self.kernel.margins or ((0, 0),) * self.ndim
        return [size - sum(side) for size, side in zip(self.kernel_size, cut, strict=True)]

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        channels = self.out_channels * self.in_channels // self.groups
        return math.prod(output_size) * channels * math.prod(self._inner_size())

    # ---- modes

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._kept.drop()  # its memory is of no use during training
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept.drop()
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0,) * self.ndim:
            text += f", padding={self.padding!r}"
        if max(self.dilation) > 1:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text


class KernelConv1d(KernelConv):
    __doc__ = KernelConv.__doc__
    ndim = 1


class KernelConv2d(KernelConv):
    __doc__ = KernelConv.__doc__
    ndim = 2


class KernelConv3d(KernelConv):
    __doc__ = KernelConv.__doc__
    ndim = 3
