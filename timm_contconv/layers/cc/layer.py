"""ContinuousConv2d: a convolution with a continuous kernel that resizes by any scale."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from ..core.arguments import check_choice, check_counts, per_dimension
from ..core.compilation import CompileMode, check_compile_mode
from ..core.geometry import GeometryOwner
from ..core.kept import Kept
from ..core.plain import PlainConv, copy_bias_, require_weights
from ..core.replacement import FIT_TOLERANCE, ConvReplacement
from ..core.shown import Elements, Quantity, ShownKernels
from ..core.tracing import as_node, is_traced
from .features_first import features_first
from .grid import (
    ResizedAxis,
    Rounding,
    Scale,
    distances,
    initial_scale,
    is_upscaling,
    phase_plateaus,
    plateaus,
    ratios,
    resized_axes,
    scale_of,
    scale_text,
)
from .merge import (
    Conv,
    common_plateaus,
    covering_support,
    distance_from,
    fit_last_layer,
    kernel_like,
    merged_conv,
    require_scale,
    rounding_of,
)
from .net import InternalNet
from .phases import apply_kernels
from .plan import Plan, resize_plan
from .spec import CcSpec

__all__ = ["ContinuousConv2d"]

#: samples per pixel in pictures of the continuous kernel
FINENESS = 8
#: up to this number of phases, each one is computed as a convolution
MOST_PHASES = 16

_cached_plan = functools.lru_cache(maxsize=4096)(resize_plan)


class ContinuousConv2d(ConvReplacement):
    """A convolution with a continuous kernel that resizes by any scale (Shocher et al. 2020).

    Output pixel n lies at g_n in the input (Eq. 2) and is the sum over its `kernel_size` neighbours m of
    I[m] K(g_n - m) (Eq. 1). K is a small net. The default padding with zeros is ResizeRight's `pad_mode="constant"`.
    There is no `weight`, because the kernel depends on scale and size.

    Args:
        in_channels, out_channels, groups, bias, padding_mode, device, dtype: as for `nn.Conv2d`.
        kernel_size: support of the kernel: the number of neighbours along each axis, in input pixels; at most 31.
        stride: the layer's scale is 1/stride, unless `scale` is given.
        padding: only "same", because the projected grid gives the positions of the kernel.
        dilation: only 1.
        scale: size of the output relative to the input's; a number from 1/256 to 256, or one for rows and one for
            columns.
        rounding: the output has ceil(size · scale) pixels, as in the paper; or "floor" or "round".
        hidden: as for `CcSpec`.
        per_phase: with hidden=None and an integer scale, the net starts with a value for each distance that occurs,
            scale · kernel_size along each axis, instead of one for each input pixel. It can then start as any
            transposed convolution.
        memory_limit: bytes for intermediate values at a scale of many phases, as for `features_first`.
        compile: as for `KernelConv`.

    Parameters:
        net.*: those of the internal net, an `InternalNet`.
        bias: (C_out,).

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.
    """

    method = "cc"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: Scale | None = None,
        rounding: Rounding = "ceil",
        hidden: Sequence[int] | None = None,
        per_phase: bool = False,
        memory_limit: int | None = None,
        compile: CompileMode = "auto",
    ) -> None:
        super().__init__()
        check_choice("padding", padding, ("same",))
        check_choice("rounding", rounding, get_args(Rounding))
        if memory_limit is not None:
            check_counts(memory_limit=memory_limit)
        self._set_arguments(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if max(self.dilation) > 1:
            raise ValueError(f"dilation={dilation!r}: expected 1; use a larger kernel_size to reach further")
        self.rounding: Rounding = rounding
        self.memory_limit = memory_limit
        self._ratios = self._built_ratios = initial_scale(self.stride, scale)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        spec = CcSpec.of(kernel_size=self.kernel_size, hidden=hidden)
        if per_phase and not is_upscaling(self._ratios):
            raise ValueError(f"per_phase=True, scale={scale_text(self._ratios)}: expected an integer scale above 1")
        start = phase_plateaus if per_phase else plateaus
        pixels = [start(*dim, rounding) for dim in zip(self._ratios, self.kernel_size, strict=True)]
        self.net = InternalNet(out_channels, in_channels // groups, pixels, spec.hidden, device, dtype)
        self.compile_construction(compile)
        self._kept: Kept[Tensor] = Kept()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew: the kernel as `InternalNet` does, the bias as `nn.Conv2d` does."""
        self.net.reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -self.net.bound, self.net.bound)

    @property
    def scale(self) -> tuple[Fraction, Fraction]:
        """Size of the output relative to the input's, for rows and columns. It can be set, also after training."""
        rows, columns = self._ratios
        return Fraction(*rows), Fraction(*columns)

    @scale.setter
    def scale(self, value: Scale) -> None:
        self._ratios = ratios("scale", value)

    # ---- the convolution

    def forward(
        self,
        x: Tensor,
        scale: Scale | None = None,
        size: int | Sequence[int] | None = None,
        shared: Sequence[Tensor] = (),
    ) -> Tensor:
        """Convolve and resize.

        Args:
            x: (N, C_in, H, W) or (C_in, H, W).
            scale: another scale than the layer's.
            size: (H', W') of the output; without a scale, size / (H, W) is the scale.
            shared: what torch.fx graphs pass, so that they hold shared geometry; it is not used.

        Returns:
            (N, C_out, H', W') or (C_out, H', W').

        Raises:
            ValueError: the scale is out of range, or the size not positive.
        """
        if is_traced(x):
            return as_node(self, x, scale=scale, size=size)
        self._require_values(x)
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            channels = self.in_channels
            raise ValueError(f"x: expected (N, {channels}, H, W) or ({channels}, H, W), got {tuple(x.shape)}")
        plan = self.plan(x.shape[-2:], scale, size)
        images = x if x.ndim == 4 else x.unsqueeze(0)
        if plan.phases <= MOST_PHASES:
            y = apply_kernels(images, self._kernels(plan), self.bias, plan, self.groups)
        else:
            weight = self.net.inputs()["weight"]
            y = features_first(images, weight, self.net.features, self.bias, plan, self.groups, self.memory_limit)
        return y if x.ndim == 4 else y.squeeze(0)

    def plan(
        self, size: Sequence[int], scale: Scale | None = None, out_size: int | Sequence[int] | None = None
    ) -> Plan:
        """The geometry for an image of `size` pixels; `scale` and `out_size` are `scale` and `size` of `forward`."""
        if out_size is not None:
            out_size = per_dimension("size", out_size, 2, minimum=1)
        ratio = scale_of(size, scale, out_size) or self._ratios
        settings = ratio, self.kernel_size, self.rounding, self.padding_mode
        if not torch.compiler.is_compiling():
            return _cached_plan(tuple(size), out_size, *settings)
        is_dynamo = torch.compiler.is_dynamo_compiling()
        if is_dynamo and ratio[0][0] * ratio[1][0] > MOST_PHASES:
            size = _fixed(size)
        return resize_plan(size, out_size, *settings, fix_start=is_dynamo)

    def _kernels(self, plan: Plan) -> Tensor:
        """Kernels of all phases, (p_y, p_x, C_out, C_in/groups, S_y, S_x), kept outside training."""

        def construct() -> Tensor:
            device = self.net.weight.device
            kernels: Tensor = self.net(*(distances(axis, 0, axis.numerator, device) for axis in plan.axes))
            return kernels

        if self.training:
            return construct()
        return self._kept.get((self.net.weight, *self.net.geometry.values()), construct, plan.key)

    # ---- the kernel

    @property
    def geometry_owner(self) -> GeometryOwner:
        return self.net

    def compile_construction(self, mode: CompileMode) -> None:
        self.net.compile_mode = check_compile_mode(mode)

    def kernel_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The continuous kernel at given distances, g - m, in input pixels.

        Args:
            rows: (..., A) vertical distances, on any device: one kernel for each of its rows, or a single one.
            columns: (..., B) horizontal distances.

        Returns:
            (..., C_out, C_in/groups, A, B), with the leading dimensions of rows, then of columns; in the parameters'
            dtype, differentiable.
        """
        device = self.net.weight.device
        kernels = self.net(*(values.reshape(-1, values.shape[-1]).to(device) for values in (rows, columns)))
        return kernels.reshape(*rows.shape[:-1], *columns.shape[:-1], *kernels.shape[2:])

    def construct(self) -> Tensor:
        """The kernel of the first output pixel if size · scale is an integer; at scale 1/k that of all pixels.

        (C_out, C_in/groups, *kernel_size), differentiable.
        """
        return self.kernel_at(*self.weight_distances())

    def weight_distances(self) -> tuple[Tensor, Tensor]:
        """The distances at which `construct` samples the continuous kernel, (S_y,) and (S_x,) on the CPU, in pixels."""
        rows, columns = (distances(axis, 0, 1, torch.device("cpu"))[0] for axis in self._reference_axes)
        return rows, columns

    @property
    def _reference_axes(self) -> list[ResizedAxis]:
        """Rows and columns of an image for which size · scale is an integer."""
        both = zip(self._ratios, self.kernel_size, strict=True)
        return [resized_axes(ratio, size, self.rounding)[0] for ratio, size in both]

    # ---- in place of a convolution, and back

    @classmethod
    def in_place_of(cls, conv: Conv, spec: CcSpec) -> Self:
        """A CC layer with scale 1/stride in place of `conv`; of a transposed convolution, with scale stride.

        Raises:
            ValueError: no rounding gives the output size of `conv` for every input.
        """
        rounding, transposed = rounding_of(conv), isinstance(conv, nn.ConvTranspose2d)
        scale: dict[str, Any] = {"scale" if transposed else "stride": conv.stride}
        return cls(
            conv.in_channels, conv.out_channels,
            spec.kernel_size or tuple(covering_support(conv, dim, rounding) for dim in (0, 1)),
            groups=conv.groups, bias=conv.bias is not None, padding_mode=conv.padding_mode,
            device=conv.weight.device, dtype=conv.weight.dtype, rounding=rounding, hidden=spec.hidden,
            per_phase=transposed and spec.hidden is None, **scale,
        )  # fmt: skip

    @classmethod
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv], tolerance: float = FIT_TOLERANCE) -> None:
        """Solve the last layers of the internal nets by least squares, so that the kernels are those of `convs`.

        The fit covers all distances that occur at the layers' scale. It is exact if the support holds the pixels that a
        convolution reads and the hidden layers suffice, as those of `hidden=None` do.
        """
        require_weights(convs)
        for layer, conv in zip(layers, convs, strict=True):
            if layer.net.hidden is None and not isinstance(conv, nn.ConvTranspose2d):  # whose plateaus are the taps
                rows, columns = (common_plateaus(convs, d, layer.kernel_size[d], layer.rounding) for d in (0, 1))
                if rows is not None and columns is not None:
                    layer.net.interpolate_((rows, columns))
            fit_last_layer(layer.net.weight, layer.net.features, conv, layer.kernel_size, layer.rounding)
            copy_bias_(layer.bias, conv)

    def fit_error(self, conv: Conv) -> float:
        """||kernel - kernel of conv|| / ||kernel of conv||, the largest for any size of the input."""
        return distance_from(conv, self.kernel_at, self.kernel_size, self.rounding)

    def to_conv(self) -> nn.Module:
        """The strided convolution with the same output, for input sizes that are multiples of the stride.

        Other sizes shift the projected grid between the pixels, and so change the kernel. At an integer scale it is a
        transposed convolution, for all sizes.

        Raises:
            ValueError: the scale is neither 1/k nor an integer, or the padding of an upscaling layer is not of zeros.
        """
        transposed = is_upscaling(self._ratios) and self.padding_mode == "zeros"
        if not transposed:
            require_scale(self._ratios)
        settings = self._reference_axes, self.rounding, self.padding_mode, self.groups, transposed
        return self._trained_as_this(merged_conv(self.kernel_at, self.bias, *settings))

    def to_conv_like(self, conv: Any) -> Any:
        """A copy of `conv`, which this layer stands in for, with this layer's kernel at the pixels that both read.

        `conv` may be on the meta device. None if more than 1e-5 of the kernel's mass lies on other pixels.

        Raises:
            ValueError: the scale is not 1/stride, or that of a transposed convolution.
        """
        require_scale(self._ratios, conv)
        kernel = kernel_like(conv, self.kernel_at, self._reference_axes)
        if kernel is None:
            return None
        plain = copy.deepcopy(conv)
        plain.weight = nn.Parameter(kernel)
        plain.bias = copy.deepcopy(self.bias)
        return self._trained_as_this(plain)

    def _trained_as_this(self, conv: Any) -> Any:
        """`conv` with this layer's training mode; its weight needs a gradient if the net does."""
        conv.weight.requires_grad_(any(value.requires_grad for value in self.net.inputs().values()))
        return conv.train(self.training)

    # ---- reports, saving, modes

    @torch.no_grad()
    def shown_kernels(self) -> ShownKernels:
        """Continuous kernels on a fine grid over their support (Fig. 3), and where `construct` samples them.

        A pixel of the picture is a distance g - m in the order of a kernel's pixels: from half the support to minus
        half. One input channel for each output channel, as `one_per_output`.
        """
        axes = [(torch.arange(k * FINENESS) + 0.5) / FINENESS - k / 2 for k in self.kernel_size]
        device, channels = self.net.weight.device, torch.arange(self.out_channels)
        features = self.net.features(*(-axis.to(device) for axis in axes))
        weight = self.net.weight[channels, channels % self.net.weight.shape[1]].to(features.dtype)
        values = torch.einsum("yxf,cf->cyx", features, weight)
        samples = torch.meshgrid(*(distance.flatten() for distance in self.weight_distances()), indexing="ij")
        position = torch.stack([size / 2 - d for size, d in zip(self.kernel_size, samples, strict=True)], -1)
        return ShownKernels(
            values, 1 / FINENESS, Elements(position.reshape(1, -1, 2) - 0.5, label="sample of the kernel")
        )

    def shown_quantities(self) -> tuple[Quantity, ...]:
        """None: the hidden layers of the internal net have no meaning of their own."""
        return ()

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds for one sample, at the layer's scale, without the construction of kernels."""
        taps, out_channels = math.prod(self.kernel_size), self.out_channels // self.groups
        per_pixel = out_channels * taps
        if self._ratios[0][0] * self._ratios[1][0] > MOST_PHASES:
            per_pixel = (taps + out_channels) * self.net.weight.shape[-1]
        return math.prod(output_size) * self.in_channels * per_pixel

    def unsaved_setting(self) -> str | None:
        if self._ratios == self._built_ratios:
            return None
        return f"scale={scale_text(self._ratios)}, built with {scale_text(self._built_ratios)}"

    def reset_setting(self) -> None:
        self._ratios = self._built_ratios

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._kept.drop()  # its memory is of no use during training
        return super().train(mode)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", scale={scale_text(self._ratios)}"
        for name, default in (("rounding", "ceil"), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else f"{text}, bias=False"


CcSpec.layers = {2: ContinuousConv2d}


def _fixed(size: Sequence[int]) -> list[int]:
    """Sizes as numbers, for which torch.compile makes one graph each.

    As symbols they would grow from layer to layer: nested fractions that take minutes to simplify.
    """
    return [operator.index(pixels) for pixels in size]
