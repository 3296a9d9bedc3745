"""Convolution with a learned Gaussian envelope (Kobayashi 2023): downsampling with a learned receptive field."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from timm.layers import pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.problem import compute_dtype
from .arguments import as_int
from .base import plain_arguments
from .envelope_plain import all_delta, dense_conv, dense_kernel, plain_convs
from .gaussian import smooth, smooth_and_convolve, spread_taps
from .kept import may_look
from .replacement import NEGLIGIBLE, ConvReplacement, PlainConv, copy_bias_, relative_error, require_weights
from .spec import LARGEST_KERNEL, LayerSpec

__all__ = ["EnvelopeSpec", "GaussianEnvelopeConv2d"]

Order = Literal["before", "after"]
SigmaPer = Literal["channel", "layer"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

#: sigma squared is taken as at least this: a delta in every dtype, and nothing overflows
SMALLEST_VARIANCE = 1 / 2000
#: sigma^2 at which a neighbour weighs 1e-6: nothing is smoothed that counts, yet sigma has a gradient and can grow
NEARLY_DELTA_VARIANCE = 1 / (2 * math.log(1e6))

_OddSize = Annotated[int, AfterValidator(lambda size: _check_size("size", size, LARGEST_KERNEL))]

for _function in ("smooth", "pad_same"):  # they go by an image's shape, which symbolic tracing does not know
    torch.fx.wrap(_function)


class GaussianEnvelopeConv2d(ConvReplacement, nn.Conv2d):
    """A convolution behind a separable Gaussian smoothing of learned width (Kobayashi 2023, Eq. 2 to 6).

    It is an `nn.Conv2d`: `weight` and `bias` are those of the convolution itself, under the same names, so that
    pretrained weights load into it and a batch norm can be fused into it as with the plain layer. At the borders
    the smoothed image goes on as `padding_mode` says; the paper leaves that open.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for `nn.Conv2d`. padding="same" also goes with a stride, as in timm's `Conv2dSame`.
        envelope_size: k_g, odd: taps of the envelope along each axis.
        inference_size: k_g outside training; None means envelope_size (Table 1e).
        order: "before" smooths the input (Eq. 2), "after" the output ahead of its bias (Eq. 5 and 6).
        sigma_per: "channel" gives every smoothed channel a width of its own, "layer" one to all (Table 1d).
        initial_sigma: width at the start, in pixels; None is the paper's: s = 0, sigma = 0.83.
        learn_sigma: False keeps the width fixed (Table 1h).

    Parameters:
        weight: (C_out, C_in/groups, K_y, K_x).
        bias: (C_out,).
        geometry["sigma"]: (C,) or, with sigma_per="layer", (1,): the s of sigma^2 = softplus(s). C is C_in with
            order "before", C_out with "after".

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.
    """

    method = "genv"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        envelope_size: int = 9,
        inference_size: int | None = None,
        order: Order = "before",
        sigma_per: SigmaPer = "channel",
        initial_sigma: float | None = None,
        learn_sigma: bool = True,
    ) -> None:
        largest_stride = stride if isinstance(stride, int) else max(stride)
        strided_same = padding == "same" and largest_stride > 1
        if strided_same and padding_mode != "zeros":
            raise ValueError(
                f"padding_mode={padding_mode!r}: expected 'zeros' with padding='same' and a stride; give the padding"
                " in pixels"
            )
        plain_padding = 0 if padding == "valid" or strided_same else padding
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, plain_padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        if padding == "same":
            self.padding = "same"
        if order not in ("before", "after"):
            raise ValueError(f"order={order!r}: expected 'before' or 'after' (the convolution)")
        if sigma_per not in ("channel", "layer"):
            raise ValueError(f"sigma_per={sigma_per!r}: expected 'channel' or 'layer'")
        if initial_sigma is not None and not 0 <= initial_sigma <= LARGEST_KERNEL:
            raise ValueError(
                f"initial_sigma={initial_sigma}: expected a width of 0 to {LARGEST_KERNEL} pixels, or None"
            )
        self.envelope_size = _check_size("envelope_size", envelope_size, LARGEST_KERNEL)
        self.inference_size = self.envelope_size
        self.order = order
        self.sigma_per = sigma_per
        self.initial_sigma = initial_sigma
        self.learn_sigma = learn_sigma
        if inference_size is not None:
            self.shrink(inference_size, name="inference_size")
        channels = 1 if sigma_per == "layer" else in_channels if order == "before" else out_channels
        sigma = nn.Parameter(torch.empty(channels, device=device, dtype=dtype), requires_grad=learn_sigma)
        self.geometry = nn.ParameterDict({"sigma": sigma})
        self._decision: tuple[Tensor, int, bool] | None = None
        self._reset_sigma()

    def reset_parameters(self) -> None:
        """Weights as in `nn.Conv2d`, sigma as in section 3 of the paper or as given."""
        super().reset_parameters()
        if "geometry" in self._modules:  # nn.Conv2d calls this method before there is one
            self._reset_sigma()

    @torch.no_grad()
    def _reset_sigma(self) -> None:
        value = 0.0 if self.initial_sigma is None else _inverse_softplus(max(self.initial_sigma**2, SMALLEST_VARIANCE))
        nn.init.constant_(self.geometry["sigma"], value)

    @property
    def variance(self) -> Tensor:
        """sigma^2 = softplus(s), (C,) or (1,), in squared pixels, in float32 at least."""
        exact = compute_dtype(
            next(self.parameters()).dtype
        )  # not of the parameter itself: under torch.fx that is a proxy
        return F.softplus(self.geometry["sigma"].to(exact)).clamp_min(SMALLEST_VARIANCE)

    @property
    def sigma(self) -> Tensor:
        """Widths of the envelopes in pixels, (C,) or (1,); differentiable."""
        return self.variance.sqrt()

    @property
    def current_size(self) -> int:
        """k_g in the layer's present mode."""
        return self.envelope_size if self.training else self.inference_size

    def shrink(self, size: int, name: str = "size") -> Self:
        """Use another k_g outside training, with the same sigma (Table 1e); `envelope_size` undoes it.

        Raises:
            ValueError: size is even, below 3 or above envelope_size; `name` is what the message calls it.
        """
        self.inference_size = _check_size(name, size, self.envelope_size)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Smooth and convolve x, (N, C_in, H, W) or (C_in, H, W)."""
        if self._is_delta():
            return self._convolve(x, self.bias, self.stride, self._weight_with_sigma())
        if self.order == "before":
            taken, left = self.split_stride()
            if not isinstance(self.padding, str) and self._only_sigma_learns_from(x):
                y = smooth_and_convolve(
                    x, self.variance, self.current_size, taken, self.weight, left, self.padding, self.dilation,
                    self.groups,
                )  # fmt: skip
                return self._add_bias(y)
            x = smooth(x, self.variance, self.current_size, taken, self.padding_mode)
            return self._convolve(x, self.bias, left, self.weight)
        y = smooth(
            self._convolve(x, None, self.stride, self.weight),
            self.variance,
            self.current_size,
            (1, 1),
            self.padding_mode,
        )
        return self._add_bias(y)

    def _only_sigma_learns_from(self, x: Tensor) -> bool:
        """Whether x, padded with zeros, needs no gradient itself, as at a network's entrance, while sigma does."""
        if not isinstance(x, Tensor) or x.requires_grad or not torch.is_grad_enabled():  # torch.fx passes proxies
            return False
        return self.padding_mode == "zeros" and self.geometry["sigma"].requires_grad

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def _weight_with_sigma(self) -> Tensor:
        """The weight, with which sigma gets its gradient, 0: a parameter without one is no part of the graph to DDP."""
        sigma = self.geometry["sigma"]
        learns = torch.is_grad_enabled() and sigma.requires_grad
        return self.weight + 0 * sigma.sum().to(self.weight.dtype) if learns else self.weight

    def _convolve(self, x: Tensor, bias: Tensor | None, stride: tuple[int, ...], weight: Tensor) -> Tensor:
        padding: Any = self.padding
        if padding == "same" and max(self.stride) > 1:
            x, padding = pad_same(x, self.kernel_size, stride, self.dilation), 0
        elif self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, stride, padding, self.dilation, self.groups)

    def split_stride(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The stride along each axis that the smoothing takes, and that left to the convolution.

        Where a kernel has one pixel and no padding, nobody reads the positions between its steps.
        """
        if self.order == "after":
            return (1, 1), self.stride
        pads = (0, 0) if isinstance(self.padding, str) else self.padding  # "same" pads a single pixel by none
        alone = [k == 1 and p == 0 for k, p in zip(self.kernel_size, pads, strict=True)]
        taken = tuple(s if a else 1 for s, a in zip(self.stride, alone, strict=True))
        left = tuple(1 if a else s for s, a in zip(self.stride, alone, strict=True))
        return taken, left

    def _is_delta(self) -> bool:
        """Whether all envelopes are deltas, so that smoothing changes nothing, not even a gradient.

        Off the CPU the answer costs a synchronisation. There it is not asked for in training, where sigma changes
        every step, and is otherwise kept for as long as the parameter's version is the same.
        """
        sigma = self.geometry["sigma"]
        if not may_look((sigma,)):
            return False
        if sigma.device.type == "cpu":
            return all_delta(sigma)
        if self.training or sigma.is_inference():
            return False
        known = self._decision
        if known is None or known[0] is not sigma or known[1] != sigma._version:
            self._decision = known = (sigma, sigma._version, all_delta(sigma))
        return known[2]

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: EnvelopeSpec) -> Self:
        """A layer in place of `conv`, with the envelope of `spec`."""
        return cls(**plain_arguments(conv, conv.kernel_size), **spec.model_dump(exclude={"method"}))

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv]) -> None:
        """Take over kernels and biases; envelopes start as deltas to 1e-6, unless `initial_sigma` says otherwise."""
        require_weights(convs)
        for layer, conv in zip(layers, convs, strict=True):
            layer.weight.copy_(conv.weight)
            copy_bias_(layer, conv)
            if layer.initial_sigma is None:
                layer.geometry["sigma"].fill_(_inverse_softplus(NEARLY_DELTA_VARIANCE))

    def fit_error(self, conv: PlainConv) -> float:
        """Relative difference of the kernel with the envelope folded in and that of `conv`, dilation spread out."""
        return relative_error(dense_kernel(self), spread_taps(conv.weight, conv.dilation))

    def to_conv_like(self, conv: PlainConv) -> PlainConv | None:
        """A copy of `conv` with this layer's weights; None where the envelopes smooth by more than 1e-5."""
        if self.fit_error(self) > NEGLIGIBLE:
            return None
        plain = copy.deepcopy(conv)
        plain.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.weight.requires_grad)
        plain.bias = None if self.bias is None else copy.deepcopy(self.bias)
        return plain.train(self.training)

    def receptive_field(self) -> tuple[int, ...]:
        """Pixels of the input that an output depends on outside training, per spatial dimension."""
        spread = (1, 1) if self.order == "before" else self.stride
        sizes = zip(self.kernel_size, self.dilation, spread, strict=True)
        return tuple((k - 1) * d + 1 + (self.inference_size - 1) * s for k, d, s in sizes)

    def to_conv(self) -> nn.Module:
        """Two depthwise convolutions and the convolution, in their order, with `inference_size`.

        Where every envelope is a delta, the convolution alone. Same output, also at the borders.
        """
        return plain_convs(self)

    def to_dense_conv(self) -> nn.Module:
        """One convolution with the larger kernel g * f (Eq. 1), with `inference_size`.

        Same output where that kernel lies inside the image. At the borders too where the convolution has no
        padding and smooths its input, and with padding_mode "circular" or "reflect"; otherwise there, up to half
        the kernel from the edge, this layer cuts the smoothed image off and the dense one does not.

        Raises:
            ValueError: padding="same" with a stride above a kernel of more than one pixel.
        """
        return dense_conv(self)

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds of one sample outside training, for the largest input with an output of this size."""
        taken, _ = self.split_stride()
        rows, columns, channels = self._smoothed(output_size)
        after_rows = math.ceil(rows / taken[0])
        smoothed = after_rows * columns + after_rows * math.ceil(columns / taken[1])
        return self._conv_multiply_adds(output_size) + self.inference_size * channels * smoothed

    def published_multiply_adds(self, output_size: Sequence[int]) -> int:
        """As the paper counts (section 3.1): 2 k_g C H W for the envelope, over all positions."""
        rows, columns, channels = self._smoothed(output_size)
        return self._conv_multiply_adds(output_size) + 2 * self.inference_size * channels * rows * columns

    def _conv_multiply_adds(self, output_size: Sequence[int]) -> int:
        return math.prod(output_size) * self.weight.numel()

    def _smoothed(self, output_size: Sequence[int]) -> tuple[int, int, int]:
        """Height, width and channels of the image that is smoothed."""
        if self.order == "after":
            return output_size[0], output_size[1], self.out_channels
        reach = [(k - 1) * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        pads = reach if isinstance(self.padding, str) else [2 * p for p in self.padding]
        rows, columns = (n * s + r - p for n, s, r, p in zip(output_size, self.stride, reach, pads, strict=True))
        return rows, columns, self.in_channels

    def sigma_summary(self) -> dict[str, float]:
        """Smallest, mean and largest sigma, and their standard deviation, in pixels: for a training log."""
        sigma = self.sigma.detach().double()
        return {
            "min": sigma.min().item(),
            "mean": sigma.mean().item(),
            "max": sigma.max().item(),
            "std": sigma.std(correction=0).item(),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decision": None}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, envelope_size={self.envelope_size}"
        if self.inference_size != self.envelope_size:
            text += f", inference_size={self.inference_size}"
        text += f", order={self.order}, sigma_per={self.sigma_per}"
        return text if self.learn_sigma else f"{text}, learn_sigma=False"


class EnvelopeSpec(LayerSpec):
    """Settings of a convolution with a Gaussian envelope; they mean what they mean there."""

    layers: ClassVar[dict[int, type[ConvReplacement]]] = {2: GaussianEnvelopeConv2d}

    method: Literal["genv"] = "genv"
    envelope_size: _OddSize = 9
    inference_size: _OddSize | None = None
    order: Order = "before"
    sigma_per: SigmaPer = "channel"
    initial_sigma: Annotated[float, Field(ge=0, le=LARGEST_KERNEL)] | None = None
    learn_sigma: bool = True

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.inference_size is not None:
            _check_size("inference_size", self.inference_size, self.envelope_size)
        return self

    def refusal(self, conv: PlainConv) -> str | None:
        """Two dimensions; any dilation, because the convolution itself stays as it is."""
        return None if len(conv.kernel_size) in self.layers else f"{self.method} has no {len(conv.kernel_size)}-D layer"


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def _check_size(name: str, size: int, largest: int) -> int:
    taps = as_int(size)
    if taps is None or taps % 2 == 0 or not 3 <= taps <= largest:
        raise ValueError(f"{name}={size!r}: expected an odd int from 3 to {largest}")
    return taps
