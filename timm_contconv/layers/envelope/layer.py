"""GaussianEnvelopeConv2d: a convolution with a Gaussian smoothing of every channel before or after it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...ops import plain_only
from ..core.finite import require_finite
from ..core.geometry import GeometryOwner
from ..core.kept import may_look
from ..core.plain import NEGLIGIBLE, PlainConv, copy_bias_, plain_arguments, plain_conv, relative_error, require_weights
from ..core.replacement import CONV_ATTRIBUTES, FIT_TOLERANCE, ConvReplacement
from ..core.shown import Elements, Quantity, ShownKernels, one_per_output
from ..core.tracing import as_node, is_traced
from .fit import EnvelopeFit
from .gaussian import envelope_filter, is_delta, raw_from_variance, variance_from_raw
from .merge import dense_kernel, dense_padding, is_plain, smoothing_convs, spread_taps
from .smoothing import smooth, smooth_and_convolve
from .spec import EnvelopeSpec

__all__ = ["GaussianEnvelopeConv2d"]


class GaussianEnvelopeConv2d(GeometryOwner, ConvReplacement):
    """A convolution with a separable Gaussian smoothing of learned width (Kobayashi 2023, Eq. 2 to 6).

    With order "before" the layer computes `conv(smooth(x))`. The convolution is a module of its own and the last
    operation, so adapters can replace it, hooks run on it, and a following norm can be folded into it. With order
    "after" the layer smooths the output of `conv` and adds its own bias, so a norm can't be folded into `conv`. The
    layer has no `weight`, because no kernel of its size is the whole operation.

    `padding_mode` also pads the image for the smoothing; the paper does not say how.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for `nn.Conv2d`. padding="same" also goes with a stride, as in timm's `Conv2dSame`.
        spec: settings of the envelope, instead of `**settings`.
        **settings: settings of the envelope, as the fields of `EnvelopeSpec`.

    Attributes:
        conv: an `nn.Conv2d`, or timm's `Conv2dSame` for padding="same" with a stride. Its stride is 1 along an axis
            where `smoothing_stride` is the stride of the layer.
        smoothing_stride: the stride of the smoothing along each axis.
        smoothing_distance: along each axis, pixels of the input between two taps of the envelope.
        smoothed_channels: C_in with order "before", C_out with "after".
        spec: the settings.

    Parameters:
        conv.weight: (C_out, C_in/groups, K_y, K_x).
        conv.bias: (C_out,); with order "after" it is the layer's own `bias` instead.
        raw_sigma: (C,) or, with sigma_per="layer", (1,): the s of sigma^2 = softplus(s), C = smoothed_channels.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed. From a forward
            pass: raw_sigma is not finite (checked on the CPU, outside compiled graphs).
    """

    method = "genv"
    dilates = True
    geometry_names = ("raw_sigma",)
    conv: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: EnvelopeSpec | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if spec is not None and settings:
            raise TypeError(f"{', '.join(settings)}: expected no settings beside spec, which holds them")
        self.spec = EnvelopeSpec.of(**settings) if spec is None else spec
        self._set_arguments(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        before = self.spec.order == "before"
        self.smoothing_stride = _smoothing_stride(self.kernel_size, self.stride, self.padding) if before else (1, 1)
        self._reach = [(k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        self.smoothing_distance = (1, 1) if before else self.stride
        self.smoothed_channels = in_channels if before else out_channels
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        if not before:
            self.register_parameter("bias", nn.Parameter(empty(out_channels)) if bias else None)
        sigmas = 1 if self.spec.sigma_per == "layer" else self.smoothed_channels
        self.raw_sigma = nn.Parameter(empty(sigmas), requires_grad=self.spec.learn_sigma)
        conv = plain_conv(
            empty(out_channels, in_channels // groups, *self.kernel_size),
            empty(out_channels) if before and bias else None,
            stride=[s // taken for s, taken in zip(self.stride, self.smoothing_stride, strict=True)],
            padding=self.padding, dilation=self.dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        assert isinstance(conv, nn.Conv2d)
        self.conv = conv.requires_grad_()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights and biases as in `nn.Conv2d`, sigma as in section 3 of the paper or as `initial_sigma` says."""
        self.conv.reset_parameters()
        if self.spec.order == "after" and self.bias is not None:
            bound = (self.in_channels // self.groups * math.prod(self.kernel_size)) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)
        if self.spec.initial_sigma is None:
            nn.init.zeros_(self.geometry["raw_sigma"])
        else:
            self.set_sigma_(self.spec.initial_sigma)

    @property
    def geometry_owner(self) -> GeometryOwner:
        return self

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(C_out,): the bias of `conv`, or with order "after" the layer's own."""
        if "bias" in self._parameters:
            return self._parameters["bias"]
        return self.conv.bias

    @property
    def variance(self) -> Tensor:
        """sigma^2 = softplus(s), (C,) or (1,), in squared pixels, in float32 at least; differentiable."""
        raw = self.geometry["raw_sigma"]
        require_finite("raw_sigma", raw)
        return variance_from_raw(raw)

    @property
    def sigma(self) -> Tensor:
        """Widths of the envelopes in pixels, (C,) or (1,); differentiable."""
        return self.variance.sqrt()

    @torch.no_grad()
    def set_sigma_(self, sigma: float) -> Self:
        """Give all envelopes this width, in pixels, in place."""
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma={sigma!r}: expected a finite number of at least 0, in pixels")
        nn.init.constant_(self.geometry["raw_sigma"], raw_from_variance(sigma**2))
        return self

    def shrink(self, size: int) -> Self:
        """Use another k_g outside training, with the same sigma (Table 1e); `envelope_size` undoes it.

        Raises:
            ValueError: size is even, below 3 or above envelope_size.
        """
        self.spec = EnvelopeSpec.of(**{**self.spec.model_dump(), "inference_size": size})
        return self

    # ---- the convolution

    def forward(self, x: Tensor, shared: Sequence[Tensor] = ()) -> Tensor:
        """Smooth and convolve x, (N, C_in, H, W) or (C_in, H, W).

        `shared` is what torch.fx graphs pass, so that they hold shared geometry; it is not used.
        """
        if is_traced(x):
            return as_node(self, x)
        self._require_values(x)
        variance = self.variance
        if self.spec.order == "after":
            y = self._smooth(self.conv(x), variance)
            return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)
        if variance.requires_grad and not x.requires_grad and self._can_be_fused():
            return smooth_and_convolve(x, variance, self.spec.taps(self.training), self.smoothing_stride, self.conv)
        return self.conv(self._smooth(x, variance))

    def _smooth(self, x: Tensor, variance: Tensor) -> Tensor:
        """The smoothed image. The CPU skips deltas, which change nothing, unless sigma needs a gradient."""
        may_skip = not variance.requires_grad and variance.device.type == "cpu" and may_look((variance,))
        if may_skip and is_delta(variance):
            return x[..., :: self.smoothing_stride[0], :: self.smoothing_stride[1]]
        return smooth(x, variance, self.spec.taps(self.training), self.smoothing_stride, self.padding_mode)

    def _can_be_fused(self) -> bool:
        """Whether `smooth_and_convolve` can run `conv`, which has no adapter then and no hook."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or plain_only():
            return False
        conv = self.conv
        hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
        return type(conv) is nn.Conv2d and not any(hooks) and "forward" not in conv.__dict__

    # ---- in place of a convolution, and back

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: EnvelopeSpec) -> Self:
        return cls(**plain_arguments(conv, conv.kernel_size), spec=spec)

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv], tolerance: float = FIT_TOLERANCE) -> None:
        """Take the widest envelopes with which kernels can stay within half of the tolerance; solve for the kernels.

        Half, because every strided layer of a network smooths, and pretrained networks keep what they say then.

        An envelope that is nearly a delta would be exact, but its sigma would have hardly any gradient. With
        `initial_sigma` only kernels are solved for.
        """
        require_weights(convs)
        for layer, conv in zip(layers, convs, strict=True):
            distances = list(zip(layer.dilation, layer.smoothing_distance, strict=True))
            fit = EnvelopeFit(conv.weight, layer.spec.taps(training=False), distances)
            given = layer.spec.initial_sigma
            variance = fit.widest(tolerance / 2) if given is None else given**2
            layer.geometry["raw_sigma"].fill_(raw_from_variance(variance))
            layer.conv.weight.copy_(fit.kernel(variance))
            copy_bias_(layer.bias, conv)

    def to_conv(self) -> nn.Module:
        """Two depthwise convolutions, of `inference_size`, and a copy of `conv`, in the layer's order.

        The convolution alone if every envelope is a delta. Same output, also at the borders.
        """
        if is_plain(self.conv) and self._has_deltas():
            return self.to_dense_conv()
        bias = self.bias if self.spec.order == "after" else None
        passes = smoothing_convs(self._taps(), self.smoothing_stride, self.padding_mode, bias)
        for smoothing in passes:
            smoothing.weight.requires_grad_(self.geometry["raw_sigma"].requires_grad)
        conv = copy.deepcopy(self.conv)
        steps = nn.Sequential(*passes, conv) if self.spec.order == "before" else nn.Sequential(conv, *passes)
        for name in CONV_ATTRIBUTES:  # models read these attributes of their convolutions
            setattr(steps, name, getattr(self, name))
        return steps.train(self.training)

    def to_dense_conv(self) -> nn.Module:
        """One convolution with the larger kernel g * f (Eq. 1), for `inference_size`.

        Same output where that kernel lies inside the image. The output at the borders is the same with padding_mode
        "circular" or "reflect", and with order "before" and no padding. Otherwise it differs up to half the kernel
        from the edge: this layer cuts the smoothed image off there, the dense convolution does not.

        Raises:
            ValueError: padding="same" and a stride larger than a kernel of more than one pixel, or `conv` is an
                adapter.
        """
        kernel, dilation = self._dense_kernel(), self.dilation
        padding: Sequence[int] | str = self.padding
        if self._has_deltas():
            kernel = self.conv.weight
        else:
            margins = [self.spec.taps(training=False) // 2 * d for d in self.smoothing_distance]
            padding, dilation = dense_padding(padding, margins, self._reach, self.stride), (1, 1)
        dense = plain_conv(
            kernel, self.bias, stride=self.stride, padding=padding, dilation=dilation, groups=self.groups,
            padding_mode=self.padding_mode,
        )  # fmt: skip
        dense.weight.requires_grad_(self.conv.weight.requires_grad)
        return dense.train(self.training)

    def to_conv_like(self, conv: PlainConv) -> PlainConv | None:
        """A copy of `conv` with this layer's weights; None if the envelopes change the kernel by more than 1e-5."""
        if self.fit_error(self.conv) > NEGLIGIBLE:
            return None
        plain = copy.deepcopy(conv)
        plain.weight = nn.Parameter(self.conv.weight.detach().clone(), requires_grad=self.conv.weight.requires_grad)
        plain.bias = copy.deepcopy(self.bias)
        return plain.train(self.training)

    def fit_error(self, conv: PlainConv) -> float:
        """Relative difference between this kernel with the envelope folded in and that of `conv`."""
        return relative_error(self._dense_kernel(), spread_taps(conv.weight, conv.dilation))

    def _has_deltas(self) -> bool:
        return not self.geometry["raw_sigma"].is_meta and is_delta(self.variance)

    def _taps(self) -> Tensor:
        """(C, k_g): the filter of every smoothed channel, outside training."""
        taps = envelope_filter(self.variance.detach(), self.spec.taps(training=False))
        return taps.to(self.geometry["raw_sigma"].dtype).expand(self.smoothed_channels, -1)

    def _dense_kernel(self) -> Tensor:
        return dense_kernel(self.conv, self._by_kernel(self._taps()), self.smoothing_distance)

    def _by_kernel(self, values: Tensor) -> Tensor:
        """Values of the smoothed channels, (C, ...), for every kernel: (C_out, C_in/groups, ...)."""
        if self.spec.order == "after":
            return values.unsqueeze(1).repeat_interleave(self.in_channels // self.groups, 1)
        return values.unflatten(0, (self.groups, -1)).repeat_interleave(self.out_channels // self.groups, 0)

    # ---- reports

    def receptive_field(self) -> tuple[int, ...]:
        """Pixels of the input that an output depends on outside training, per spatial dimension."""
        added = self.spec.taps(training=False) - 1
        return tuple(size + added * d for size, d in zip(self._reach, self.smoothing_distance, strict=True))

    @torch.no_grad()
    def shown_kernels(self) -> ShownKernels:
        """The kernels with the envelope folded in, and the envelope's σ at their centre."""
        kernels = super().shown_kernels().values
        sigma = one_per_output(self._by_kernel(self.sigma.expand(self.smoothed_channels)))
        centre = (sigma.new_tensor(kernels.shape[1:]) - 1) / 2
        reach = sigma[:, None, None] * sigma.new_tensor(self.smoothing_distance)
        elements = Elements(centre.expand(len(sigma), 1, -1), "ellipse", reach, label="envelope σ")
        return ShownKernels(kernels, elements=elements)

    @torch.no_grad()
    def shown_quantities(self) -> tuple[Quantity, ...]:
        return (Quantity("σ of envelopes", "pixels", self.sigma.detach().reshape(-1, 1), "Kobayashi 2023, Fig. 4"),)

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds for one sample outside training, for the largest input with an output of this size."""
        return self._multiply_adds(output_size, self.smoothing_stride)

    def published_multiply_adds(self, output_size: Sequence[int]) -> int:
        """As the paper counts (section 3.1): 2 k_g C H W for the envelope, over all positions."""
        return self._multiply_adds(output_size, (1, 1))

    def _multiply_adds(self, output_size: Sequence[int], smoothing_stride: Sequence[int]) -> int:
        convolution = math.prod((*output_size, *self.kernel_size, self.out_channels, self.in_channels // self.groups))
        size = output_size
        if self.spec.order == "before":
            pads = [k - 1 if isinstance(self.padding, str) else 2 * self.padding[d] for d, k in enumerate(self._reach)]
            size = [n * s + k - 1 - p for n, s, k, p in zip(output_size, self.stride, self._reach, pads, strict=True)]
        rows, columns = (math.ceil(n / s) for n, s in zip(size, smoothing_stride, strict=True))
        return convolution + self.spec.taps(training=False) * self.smoothed_channels * rows * (size[1] + columns)

    def extra_repr(self) -> str:
        settings = self.spec.model_dump(exclude={"method"}, exclude_defaults=True)
        return ", ".join([f"stride={self.stride}", *(f"{name}={value}" for name, value in settings.items())])


EnvelopeSpec.layers = {2: GaussianEnvelopeConv2d}


def _smoothing_stride(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int] | str
) -> tuple[int, ...]:
    """The part of the stride that the smoothing does: all of it along an axis with a kernel of one pixel, unpadded.

    Along such an axis the convolution does not use the positions between its steps.
    """
    pads = (0, 0) if isinstance(padding, str) else padding  # "same" adds no padding to a single pixel
    return tuple(s if k == 1 and p == 0 else 1 for k, s, p in zip(kernel_size, stride, pads, strict=True))
