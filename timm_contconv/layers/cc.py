"""CC layers: convolutions that resize by any scale (Shocher et al. 2020, "From Discrete to Continuous Convolution").

The kernel is a continuous function, a small net over sub-pixel distances. A forward pass takes the paper's four
steps: the projected grid and its neighbours (`cc_grid`), the weights at their distances (`cc_net`), and applying them
(`cc_paths`).
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..ops.problem import compute_dtype
from .base import ConstructedConv, without_autocast
from .cc_grid import SMALLEST_SCALE, Axis, Ratio, Rounding, Scale, distances, fraction, ratios
from .cc_kept import KeptKernels
from .cc_net import internal_features, interpolating_net, interpolating_widths
from .cc_paths import Plan, apply_kernels, features_first, phase_kernels, plan_of, resize_plan
from .cc_plain import (
    conv_axes,
    covering_support,
    fit_last_layer,
    kernel_overlap,
    rounding_of,
    strided_plain_conv,
)
from .compilation import CompileMode
from .kept import may_keep, to_be_kept
from .replacement import NEGLIGIBLE, ConvReplacement, PlainConv, copy_bias_, require_weights
from .spec import LayerSpec

__all__ = ["CcSpec", "ContinuousConv2d"]

#: scales with at most so many phases are computed as one convolution for each
MOST_PHASES = 16
LARGEST_SUPPORT = 31
LARGEST_WIDTH = 1024
#: bytes: on the CPU half of it, what a chunk computes, is about what a core's cache holds
MEMORY_LIMIT_CPU, MEMORY_LIMIT = 2**23, 2**29

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
#: scale, kernel size, rounding and padding mode of a layer
_Settings = tuple[tuple[Ratio, Ratio], tuple[int, ...], Rounding, str]

_Size = Annotated[int, Field(ge=1, le=LARGEST_SUPPORT)]
_Width = Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]


class ContinuousConv2d(ConstructedConv):
    """A convolution with a continuous kernel, which resizes by any scale (Shocher et al. 2020).

    Output pixel n lies at g_n in the input (Eq. 2) and is the sum over its `kernel_size` neighbours m of
    I[m] K(g_n - m) (Eq. 1). The internal net K has hidden layers with ReLUs, `geometry`, and a linear last one,
    `internal_weight`. Beyond the borders an image goes on with zeros (as ResizeRight's `pad_mode="constant"`), or as
    `padding_mode` says.

    Args:
        in_channels, out_channels, groups, bias, device, dtype: as for `nn.Conv2d`.
        kernel_size: support of the kernel, in input pixels: so many neighbours along each axis.
        stride: the layer's scale is 1/stride, unless `scale` is given.
        padding: only "same": the projected grid says where the kernel is applied, and how often.
        dilation: only 1.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        scale: size of the output relative to the input's; a number, or one for rows and one for columns.
        rounding: the output has ceil(size · scale) pixels, as in the paper, or "floor", or "round".
        hidden: units of the hidden layers of the internal net. None means three small layers that start as linear
            interpolation between the pixels of a kernel (`interpolating_net`).
        memory_limit: bytes that a pass at a scale of many phases may take for what it computes in between; above
            that it works in chunks and computes them again in the backward pass. None is 8 MiB on the CPU and 512 MiB
            elsewhere.
        compile: as for `ConstructedConv`.

    Parameters:
        internal_weight: (C_out, C_in/groups, F + 1), the last layer of the net: F features, then its bias.
        geometry["weight_1"], ["bias_1"], ...: (H_1, 2), (H_1,), (H_2, H_1), ...: the layers before it. H_last is F.
        bias: (C_out,).

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.
    """

    ndim = 2
    method = "cc"
    #: the hidden layers of the internal net: `cc_net.internal_features`, or another function like it
    internal_net: Callable[..., Tensor] = staticmethod(internal_features)

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
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: Scale | None = None,
        rounding: Rounding = "ceil",
        hidden: Sequence[int] | None = None,
        memory_limit: int | None = None,
        compile: CompileMode = "auto",
    ) -> None:
        if padding != "same":
            raise ValueError(f"padding={padding!r}: expected 'same'; the projected grid places a continuous kernel")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, compile=compile,
        )  # fmt: skip
        if scale is not None and max(self.stride) > 1:
            raise ValueError(f"stride={stride!r}, scale={scale!r}: expected one of them; a scale is 1/stride")
        if max(self.stride) > 1 / SMALLEST_SCALE:
            raise ValueError(f"stride={stride!r}: expected at most {1 / SMALLEST_SCALE}; the layer's scale is 1/stride")
        if rounding not in ("ceil", "floor", "round"):
            raise ValueError(f"rounding={rounding!r}: expected 'ceil', 'floor' or 'round'")
        if max(self.kernel_size) > LARGEST_SUPPORT:
            raise ValueError(f"kernel_size={kernel_size!r}: expected at most {LARGEST_SUPPORT} pixels")
        if memory_limit is not None and (type(memory_limit) is not int or memory_limit < 1):
            raise ValueError(f"memory_limit={memory_limit!r}: expected a positive number of bytes, or None")
        self.scale = tuple(Fraction(1, s) for s in self.stride) if scale is None else scale
        self._built_ratios = self._ratios
        self.rounding = rounding
        self.hidden = _check_hidden(hidden)
        self.memory_limit = memory_limit
        self._kept_kernels: KeptKernels | None = None
        self._create_parameters(device, dtype)
        self.reset_parameters()

    def _create_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        widths = self.hidden or interpolating_widths(self.kernel_size)
        geometry = {}
        for number, (inputs, units) in enumerate(zip((2, *widths), widths, strict=False), start=1):
            geometry[f"weight_{number}"] = nn.Parameter(empty(units, inputs))
            geometry[f"bias_{number}"] = nn.Parameter(empty(units))
        self.geometry = nn.ParameterDict(geometry)
        self.internal_weight = nn.Parameter(empty(self.out_channels, self.in_channels // self.groups, widths[-1] + 1))

    @property
    def scale(self) -> tuple[Fraction, Fraction]:
        """Size of the output relative to the input's, for rows and columns. It can be set, also after training."""
        (a, b), (c, d) = self._ratios
        return Fraction(a, b), Fraction(c, d)

    @scale.setter
    def scale(self, value: Scale) -> None:
        self._ratios: tuple[Ratio, Ratio] = ratios("scale", value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """With `hidden=None` the net starts as linear interpolation between the pixels of a kernel of `nn.Conv2d`.

        At scales 1/k these pixels stand where the distances are. Given hidden layers are drawn as `nn.Linear` draws
        them, and the last one so that kernels have the variance of plain ones.
        """
        if self.internal_weight.is_meta:
            return
        bound = 1 / math.sqrt(self.in_channels // self.groups * math.prod(self.kernel_size))
        if self.hidden is None:
            with torch.device("cpu"):  # whatever the default is
                start = interpolating_net([self._plateaus(dim) for dim in (0, 1)])
            for name, value in start.items():
                self.geometry[name].copy_(value)
        else:
            for number in range(1, len(self.hidden) + 1):
                limit = 1 / math.sqrt(self.geometry[f"weight_{number}"].shape[1])
                nn.init.uniform_(self.geometry[f"weight_{number}"], -limit, limit)
                nn.init.uniform_(self.geometry[f"bias_{number}"], -limit, limit)
        spread = bound if self.hidden is None else bound / self._feature_norm()
        nn.init.uniform_(self.internal_weight, -spread, spread)
        self.internal_weight[..., -1] = 0
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _plateaus(self, dim: int) -> list[tuple[float, float]]:
        """Lowest and highest distance of each pixel of the kernel along one dimension."""
        numerator, denominator = self._ratios[dim]
        size = self.kernel_size[dim]
        if numerator > 1:
            return [((size - 1) / 2 - pixel,) * 2 for pixel in range(size)]
        rows = [distances(a, 0, 1, torch.device("cpu"))[1][0] for a in conv_axes(denominator, size, self.rounding)]
        return [(min(ends), max(ends)) for ends in zip(*(row.tolist() for row in rows), strict=True)]

    def _feature_norm(self) -> float:
        """Root of the mean, over distances in the support, of the sum of the features' squares."""
        device = self.internal_weight.device
        rows, columns = (size * (torch.arange(32, device=device) / 31 - 0.5) for size in self.kernel_size)
        phi = self.features(rows, columns)
        return max(float(phi[..., :-1].square().sum(-1).mean().sqrt()), 1e-3)

    def features(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What the last layer of the internal net is applied to.

        Args:
            rows, columns: (A,) and (B,) distances in pixels.

        Returns:
            (A, B, F + 1), in float32 (float64 if the parameters are float64), also under autocast.
        """
        return _features(type(self).internal_net, dict(self.geometry.items()), rows, columns)

    def kernel_function(self) -> Callable[..., Tensor]:
        return functools.partial(_kernels, net=type(self).internal_net)

    def kernel_inputs(self) -> Mapping[str, Tensor]:
        return {"weight": self.internal_weight, **self.geometry}

    def kernel_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The continuous kernel at given distances, g - m, in input pixels.

        Args:
            rows: (..., A) vertical distances: one kernel for each of its rows, or a single one.
            columns: (..., B) horizontal distances.

        Returns:
            (..., C_out, C_in/groups, A, B), the dimensions ahead being those of rows, then of columns; in the
            parameters' dtype, differentiable.
        """
        ahead = (*rows.shape[:-1], *columns.shape[:-1])
        kernels = self._construct(rows.reshape(-1, rows.shape[-1]), columns.reshape(-1, columns.shape[-1]))
        return kernels.reshape(*ahead, *kernels.shape[2:])

    @torch.no_grad()
    def sampled_kernel(self, samples: int, channels: int) -> Tensor:
        """Continuous kernels on a dense grid over their support, for pictures (Fig. 3).

        Args:
            samples: along each axis.
            channels: so many output channels, for the first input channel.

        Returns:
            (channels, samples, samples); distances fall from support/2 to -support/2, as the pixels of a kernel follow
            one another.
        """
        centres = (torch.arange(samples, device=self.internal_weight.device) + 0.5) / samples - 0.5
        features = self.features(*(-size * centres for size in self.kernel_size))
        return torch.einsum("yxf,cf->cyx", features, self.internal_weight[:channels, 0].to(features.dtype))

    def weight_distances(self) -> tuple[Tensor, Tensor]:
        """The distances at which `weight` samples the continuous kernel, (S_y,) and (S_x,), in pixels."""
        rows, columns = self._distances(self._reference(), 1)
        return rows[0].cpu(), columns[0].cpu()

    def _construct(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(P_y, S_y) and (P_x, S_x) distances to (P_y, P_x, C_out, C_in/groups, S_y, S_x)."""
        inputs = {"rows": rows, "columns": columns, **self.kernel_inputs()}
        return self._computed(self.kernel_function(), inputs).to(self.internal_weight.dtype)

    def construct(self) -> Tensor:
        """The kernel of the first output pixel, where size · scale is whole; at scale 1/k that of all pixels.

        Returns:
            (C_out, C_in/groups, *kernel_size), differentiable with respect to the parameters.
        """
        return self._construct(*self._distances(self._reference(), 1))[0, 0]

    @property
    def weight(self) -> Tensor:
        """`construct()`, kept outside training and without gradients while the parameters are the same."""
        return self._kernels(plan_of(self._reference(), "zeros"), 1)[0, 0]

    def _reference(self) -> tuple[Axis, Axis]:
        """Axes of the smallest image with a whole size · scale."""
        (a, b), (c, d) = self._ratios
        return Axis(b, a, a, b, self.kernel_size[0]), Axis(d, c, c, d, self.kernel_size[1])

    def _distances(self, axes: tuple[Axis, Axis], phases: int | None = None) -> tuple[Tensor, Tensor]:
        """Distances of the first phases, of all where no number is given."""
        device = self.internal_weight.device
        rows, columns = (distances(axis, 0, phases or axis.period, device)[1] for axis in axes)
        return rows, columns

    def _kernels(self, plan: Plan, phases: int | None = None) -> Tensor:
        """Kernels of the first phases, kept where that may be."""
        weight, hidden = self.internal_weight, self._hidden_layers()
        if self.training or not may_keep((weight, *hidden)):
            return self._construct(*self._distances(plan.axes, phases))
        key, kept = (plan.axes[0][2:], plan.axes[1][2:], plan.offsets, phases or plan.phases), self._kept_kernels
        if kept is None or key != kept.key or not kept.is_current(weight, hidden):
            with to_be_kept():
                kernels = self._construct(*self._distances(plan.axes, phases)).contiguous()
                self._kept_kernels = kept = KeptKernels(key, weight, hidden, kernels)
        return kept.kernels

    def _hidden_layers(self) -> Iterable[Tensor]:
        """`geometry.values()`, which is several times slower."""
        return self.geometry._parameters.values()  # type: ignore[return-value]

    def forward(self, x: Tensor, scale: Scale | None = None, size: int | Sequence[int] | None = None) -> Tensor:
        """Convolve and resize.

        Args:
            x: (N, C_in, H, W) or (C_in, H, W).
            scale: another scale than the layer's.
            size: (H', W') of the output; without a scale, size / (H, W) is the scale.

        Returns:
            (N, C_out, H', W') or (C_out, H', W').

        Raises:
            ValueError: the scale is out of range, or the size not positive.
        """
        if not isinstance(x, Tensor):  # torch.fx: shapes are known when the traced module runs
            if type(self).internal_net is not internal_features:
                raise TypeError(f"torch.fx: a {type(self).__name__} with an internal_net of its own can't be traced")
            return _resize(
                x, scale, size, self.internal_weight, dict(self.geometry.items()), self.bias, self._settings(),
                self.groups, self.memory_limit,
            )  # fmt: skip
        if scale is None and size is None and (y := self._again(x)) is not None:
            return y
        images, plan = _images(x, self.in_channels), self.plan(x.shape[-2:], scale, _check_size(size))
        if plan.phases <= MOST_PHASES:
            kernels, kept = self._kernels(plan), self._kept_kernels
            if scale is None and size is None and kept is not None and kept.kernels is kernels:
                kept.last = x.shape, self._settings(), plan
            y = apply_kernels(images, kernels, self.bias, plan, self.groups)
        else:
            limit = self.memory_limit or _memory_limit(x)
            y = features_first(images, self.internal_weight, self.features, self.bias, plan, self.groups, limit)
        return y if x.ndim == 4 else y.squeeze(0)

    def plan(self, size: Sequence[int], scale: Scale | None = None, out_size: Sequence[int] | None = None) -> Plan:
        """How an image of `size` pixels is resized; other arguments as in `forward`."""
        return _plan(tuple(size), scale, out_size, self._settings())

    def _settings(self) -> _Settings:
        """What the plan for an image follows from, besides its size."""
        return self._ratios, self.kernel_size, self.rounding, self.padding_mode

    def _again(self, x: Tensor) -> Tensor | None:
        """The output by the last call's kernels, if nothing has changed; on the CPU, where short calls gain by it."""
        kept = self._kept_kernels
        if kept is None or kept.last is None or torch.is_grad_enabled() or self.training or not x.is_cpu:
            return None
        shape, settings, plan = kept.last
        if x.shape != shape or x.ndim != 4 or self._settings() != settings:
            return None
        weight, hidden = self.internal_weight, self._hidden_layers()
        if not may_keep((weight, *hidden)) or not kept.is_current(weight, hidden):
            return None
        return apply_kernels(x, kept.kernels, self.bias, plan, self.groups)

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: CcSpec) -> Self:
        """A CC layer with scale 1/stride in place of `conv`.

        Without a kernel_size in the spec its support is the smallest that holds the pixels that `conv` reads.

        Raises:
            ValueError: no rounding gives the output size of `conv` for every input.
        """
        rounding = rounding_of(conv)
        size = spec.kernel_size or tuple(covering_support(conv, dim, rounding) for dim in (0, 1))
        return cls(
            conv.in_channels, conv.out_channels, size, conv.stride, groups=conv.groups,
            bias=conv.bias is not None, padding_mode=conv.padding_mode,
            device=conv.weight.device, dtype=conv.weight.dtype, rounding=rounding, hidden=spec.hidden,
        )  # fmt: skip

    @classmethod
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv]) -> None:
        """Solve the last layers of the internal nets by least squares, so that the kernels are those of `convs`.

        At the distances that occur with sizes that are multiples of the stride, and with those beside them. That is
        exact where the support holds the pixels that a convolution reads and the hidden layers suffice, as those of
        `hidden=None` do.

        Raises:
            ValueError: a convolution has no weights (meta device).
        """
        require_weights(convs)
        for layer, conv in zip(layers, convs, strict=True):
            fit_last_layer(layer.internal_weight, layer.features, conv, layer.kernel_size, layer.rounding)
            copy_bias_(layer, conv)

    @torch.no_grad()
    def fit_error(self, conv: PlainConv) -> float:
        """||kernel - kernel of conv|| / ||kernel of conv||, where input sizes are multiples of the stride."""
        wanted, inside = conv.weight.double(), torch.zeros_like(self.weight, dtype=torch.float64)
        own, its = kernel_overlap(conv, self._reference(), self.rounding)
        inside[own] = wanted[its]
        missed = wanted.square().sum() - inside.square().sum()
        distance = ((self.weight - inside).square().sum() + missed.clamp_min(0)).sqrt()
        return float(distance / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))

    def to_conv_like(self, conv: PlainConv) -> PlainConv | None:
        """A copy of `conv`, which this layer stands in for, with this layer's kernel where it reads the same pixels.

        `conv` may be on the meta device. None where more than 1e-5 of the kernel's mass lies elsewhere.

        Raises:
            ValueError: the scale is not 1/stride.
        """
        self._require_strides(conv.stride)
        kernel = self.construct().detach()
        plain = copy.deepcopy(conv)
        own, its = kernel_overlap(conv, self._reference(), self.rounding)
        weight = kernel.new_zeros(conv.weight.shape)
        weight[its] = kernel[own]
        mass = kernel.abs().sum(dtype=torch.float64)
        if mass - weight.abs().sum(dtype=torch.float64) > NEGLIGIBLE * mass:
            return None
        plain.weight = nn.Parameter(weight, requires_grad=self.internal_weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return plain.train(self.training)

    def _require_strides(self, stride: Sequence[int] | None = None) -> None:
        ratio = self._ratios if stride is None else tuple((1, s) for s in stride)
        if any(numerator > 1 for numerator, _ in self._ratios) or ratio != self._ratios:
            wanted = "1/k, k whole," if stride is None else f"1/stride, stride {tuple(stride)},"
            raise ValueError(
                f"scale={_text(self._ratios)}: expected {wanted} which a plain convolution has too; `layer.scale` sets"
                " it"
            )

    def unsaved_setting(self) -> str | None:
        if self._ratios == self._built_ratios:
            return None
        return f"scale={_text(self._ratios)}, built with {_text(self._built_ratios)}"

    def reset_setting(self) -> None:
        self._ratios = self._built_ratios

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds for one sample, at the layer's scale; building kernels is not counted."""
        if self._ratios[0][0] * self._ratios[1][0] <= MOST_PHASES:
            return super().multiply_adds(output_size)
        taps, features = math.prod(self.kernel_size), self.internal_weight.shape[-1]
        channels = self.out_channels // self.groups + taps
        return math.prod(output_size) * self.in_channels * features * channels

    def to_conv(self) -> nn.Module:
        """The strided convolution with the same output, where input sizes are multiples of the stride.

        With other sizes the projected grid lies elsewhere between the pixels, and the kernel there is another one.

        Raises:
            ValueError: the scale is not 1/k.
        """
        self._require_strides()
        first, stride = [axis.first(0) for axis in self._reference()], tuple(q for _, q in self._ratios)
        kernel = self.construct().detach()
        conv = strided_plain_conv(kernel, stride, first, self.rounding, self.padding_mode, self.groups)
        conv.weight.requires_grad_(self.internal_weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._kept_kernels = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept_kernels = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept_kernels": None}

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, scale={_text(self._ratios)}"
        if self.rounding != "ceil":
            text += f", rounding={self.rounding}"
        if self.hidden is not None:
            text += f", hidden={self.hidden}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text if self.padding_mode == "zeros" else f"{text}, padding_mode={self.padding_mode}"


class CcSpec(LayerSpec):
    """Settings of a CC layer; they mean what they mean there. Its scale is 1/stride of the convolution."""

    layers: ClassVar[dict[int, type[ConvReplacement]]] = {2: ContinuousConv2d}

    method: Literal["cc"] = "cc"
    kernel_size: _Size | tuple[_Size, _Size] | None = None
    hidden: Annotated[tuple[_Width, ...], Field(min_length=1, max_length=8)] | None = None

    def refusal(self, conv: PlainConv) -> str | None:
        reason = super().refusal(conv)
        if reason is None:
            try:
                rounding_of(conv)
            except ValueError as error:
                return str(error)
        return reason


def _kernels(rows: Tensor, columns: Tensor, weight: Tensor, net: Callable[..., Tensor], **hidden: Tensor) -> Tensor:
    return phase_kernels(rows, columns, weight, functools.partial(net, **hidden))


def _features(net: Callable[..., Tensor], hidden: Mapping[str, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    exact = compute_dtype(hidden["bias_1"].dtype)
    with without_autocast(rows.device.type):
        return net(rows.to(exact), columns.to(exact), **{name: value.to(exact) for name, value in hidden.items()})


@torch.fx.wrap
def _resize(
    x: Tensor, scale: Scale | None, size: int | Sequence[int] | None, weight: Tensor, hidden: Mapping[str, Tensor],
    bias: Tensor | None, settings: _Settings, groups: int, memory_limit: int | None,
) -> Tensor:  # fmt: skip
    """`ContinuousConv2d.forward` as a function of the layer's parameters and settings."""
    images = _images(x, weight.shape[1] * groups)
    plan = _plan(tuple(x.shape[-2:]), scale, _check_size(size), settings)
    features = functools.partial(_features, internal_features, hidden)
    if plan.phases <= MOST_PHASES:
        rows, columns = (distances(axis, 0, axis.period, x.device)[1] for axis in plan.axes)
        kernels = phase_kernels(rows, columns, weight.to(compute_dtype(weight.dtype)), features).to(weight.dtype)
        y = apply_kernels(images, kernels, bias, plan, groups)
    else:
        y = features_first(images, weight, features, bias, plan, groups, memory_limit or _memory_limit(x))
    return y if x.ndim == 4 else y.squeeze(0)


def _images(x: Tensor, channels: int) -> Tensor:
    """x with a batch dimension."""
    if x.ndim not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"x: expected (N, {channels}, H, W) or ({channels}, H, W), got {tuple(x.shape)}")
    return x if x.ndim == 4 else x.unsqueeze(0)


def _plan(size: tuple[int, ...], scale: Scale | None, out_size: Sequence[int] | None, settings: _Settings) -> Plan:
    ratio, kernel_size, rounding, padding_mode = settings
    if scale is not None:
        ratio = ratios("scale", scale)
    elif out_size is not None:
        ratio = fraction(out_size[0], size[0]), fraction(out_size[1], size[1])
    make = resize_plan if torch.compiler.is_compiling() else _cached_plan
    return make(size, out_size, ratio, kernel_size, rounding, padding_mode)


_cached_plan = functools.lru_cache(maxsize=4096)(resize_plan)


def _memory_limit(x: Tensor) -> int:
    return MEMORY_LIMIT_CPU if x.device.type == "cpu" else MEMORY_LIMIT


def _check_hidden(hidden: Sequence[int] | None) -> tuple[int, ...] | None:
    if hidden is None:
        return None
    widths = tuple(hidden) if isinstance(hidden, Sequence) else ()
    if not widths or any(isinstance(w, bool) or not isinstance(w, int) or not 1 <= w <= LARGEST_WIDTH for w in widths):
        raise ValueError(f"hidden={hidden!r}: expected ints from 1 to {LARGEST_WIDTH}, one per hidden layer, or None")
    return widths


def _check_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        sizes = tuple(map(operator.index, size if isinstance(size, Sequence) else (size, size)))
    except TypeError:
        sizes = ()
    if isinstance(size, bool) or len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"size={size!r}: expected a positive int, or one for rows and one for columns")
    return sizes[0], sizes[1]


def _text(scale: tuple[Ratio, Ratio]) -> str:
    return "×".join(str(Fraction(*ratio)) for ratio in dict.fromkeys(scale))
