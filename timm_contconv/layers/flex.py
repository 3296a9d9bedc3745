"""FlexConv (Romero et al. 2022): kernels that a small network generates and a Gaussian mask of learned size cuts out.

The kernel is a function over [-1, 1] per dimension, sampled on a grid as large as the input: a MAGNet times the mask.
Where the mask is under a threshold the kernel is zero, and what is zero at its borders is not convolved with.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import conv as convolve
from .arguments import is_causal
from .base import ConstructedConv, plain_arguments
from .compilation import CompileMode
from .flex_crop import Crop, crop_to_mask, is_inside, margins, pad_to_crop, slices, visible, whole
from .flex_fit import fit_magnet_
from .flex_grid import resampled_padding, sampled_axis
from .kept import may_look
from .magnet import (
    ENVELOPE_CUT,
    check_magnet,
    filter_frequencies,
    is_number,
    is_positive_int,
    magnet_features,
    magnet_shapes,
    reset_magnet_,
)
from .replacement import ConvReplacement, PlainConv, centred, copy_bias_, require_weights
from .spec import KernelSpec

__all__ = ["FlexConv1d", "FlexConv2d", "FlexSpec", "flex_kernel", "gaussian_mask"]

torch.fx.wrap("convolve")  # the engine chooses by shape, and
torch.fx.wrap("flex_kernel")  # this loops over filters: symbolic tracing knows neither shape nor number

SMALLEST_SIGMA = 1e-4  # below it a mask counts as this wide, so that nothing is divided by zero
INITIAL_SIGMA = 0.125  # appendix D.1
INPUT_SCALE = 25.6  # appendix D.1
THRESHOLD = 0.1  # Fig. 7
CROP_EVERY = 16  # training steps between two looks at a mask, where looking makes an accelerator wait
NARROWEST = 1.01  # pixels that a constrained mask shows, more than one by what rounding may take away, in bfloat16 too
GROWTH = 1 / 16  # what a mask may grow by between two looks, on either side; half a kernel is 1


def gaussian_mask(mean: Tensor, sigma: Tensor, coordinates: Sequence[Tensor], threshold: float) -> Tensor:
    """The anisotropic Gaussian mask on a grid (Romero et al. 2022, Eq. 1), zero where an axis is under the threshold.

    Args:
        mean, sigma: (D,).
        coordinates: D tensors (K_d,), the axes of the grid.
        threshold: 0.1 in the paper (Fig. 7); 0 for none.

    Returns:
        (prod(K),).
    """
    mask = torch.ones_like(mean[:1])
    for d, axis in enumerate(coordinates):
        factor = torch.exp(-0.5 * ((axis - mean[d]) / sigma[d].abs().clamp(min=SMALLEST_SIGMA)).square())
        mask = (mask[:, None] * torch.where(factor >= threshold, factor, 0)).flatten()
    return mask


def flex_kernel(
    sine_weight: Tensor,
    sine_bias: Tensor,
    mean: Tensor,
    gamma: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    mask_mean: Tensor | None = None,
    mask_sigma: Tensor | None = None,
    threshold: float = 0.0,
    scale: float = 1.0,
    **coordinates: Tensor,
) -> Tensor:
    """Dense FlexConv kernel: MAGNet times mask (Romero et al. 2022, Eq. 1-8), times a factor (Eq. 9).

    The mask multiplies the hidden channels instead of the kernel, of which there are more.

    Args:
        sine_weight, ..., hidden_bias: see `magnet_features`.
        output_weight: (C_out, C_in/groups, H).
        output_bias: (C_out, C_in/groups).
        mask_mean, mask_sigma: (D,), or None for no mask (CKConv).
        threshold: see `gaussian_mask`.
        scale: factor of the kernel.
        coordinates: D tensors (K_d,), the axes of the grid, in the order of their names.

    Returns:
        (C_out, C_in/groups, *K).
    """
    axes = [coordinates[name] for name in sorted(coordinates)]
    features = magnet_features(sine_weight, sine_bias, mean, gamma, hidden_weight, hidden_bias, axes)
    features = torch.cat((features, torch.ones_like(features[:1])))
    if mask_mean is not None and mask_sigma is not None:
        features = features * gaussian_mask(mask_mean, mask_sigma, axes, threshold)
    weights = torch.cat((output_weight.flatten(0, 1), output_bias.reshape(-1, 1)), 1)
    kernel = (weights * scale) @ features
    return kernel.reshape(*output_bias.shape, *(len(axis) for axis in axes))


class _FlexConv(ConstructedConv):
    """Convolution with a kernel of learned size (Romero et al. 2022).

    The constructed kernel is zero where the mask is under the threshold along an axis. What is zero at its borders
    is left out of the convolution, in eager mode; `weight` and `construct()` give the whole kernel all the same.

    Takes the arguments of `ConstructedConv`, and

    Args:
        kernel_size: of the whole kernel, before the mask; as large as the input, or one larger to be odd.
        padding: as there. By default "same" in 2-D and "causal" in 1-D: zeros before the sequence, so that output i
            depends on inputs 0..i and there is one output per input (at stride 1).
        hidden_channels: of the MAGNet.
        hidden_layers: of the MAGNet, which has one Gabor filter more.
        input_scale: speed of the MAGNet's initial sines (appendix D.1).
        mask: False leaves the mask out: CKConv. What follows concerns the mask and is then without effect.
        initial_sigma: the mask's width at the start; half a kernel is 1. Where that is too narrow to leave a pixel of
            the kernel, the mask starts as wide as `constrain_` keeps it.
        threshold: where the mask is under it the kernel is zero (Fig. 7); 0 for no cropping.
        penalize_mask: count the mask's frequency in the penalty (Eq. 26); off in the paper's experiments but one.
        crop_every: training steps between two looks at the mask. Default: 1 on the CPU; 16 elsewhere, because
            looking makes an accelerator wait: there the crop has room for the growth of 16 steps at the paper's
            learning rate, and a mask that grows faster is cut for so long, with a warning. Forward passes in training
            are counted; from the first call of `tcc.constrain_` on, its calls, so it then has to follow every step.

    Parameters:
        sine_weight, mean, gamma: (L, H, D) of L = hidden_layers + 1 Gabor filters with H channels.
        sine_bias: (L, H).
        hidden_weight, hidden_bias: (L - 1, H, H) and (L - 1, H).
        output_weight, output_bias: (C_out, C_in/groups, H) and (C_out, C_in/groups).
        geometry["mask_mean"], geometry["mask_sigma"]: (D,), the kernel spans -1 to 1; not with mask=False.
        bias: (C_out,).

    Raises:
        ValueError: an argument is out of range. Also from a forward pass, if the mask is not finite where it is
            looked at.
    """

    method = "flex"
    geometry_lr_scale = 0.1  # appendix D.2

    sine_weight: Tensor
    sine_bias: Tensor
    mean: Tensor
    gamma: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

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
        hidden_channels: int = 32,
        hidden_layers: int = 3,
        input_scale: float = INPUT_SCALE,
        mask: bool = True,
        initial_sigma: float = INITIAL_SIGMA,
        threshold: float = THRESHOLD,
        penalize_mask: bool = False,
        crop_every: int | None = None,
        compile: CompileMode = "auto",
    ) -> None:
        causal = is_causal(self.ndim, padding, padding_mode)
        known = 0 if causal else "same" if padding is None else padding
        super().__init__(
            in_channels, out_channels, kernel_size, stride, known, dilation, groups, bias, padding_mode,
            device, dtype, compile=compile,
        )  # fmt: skip
        check_magnet(hidden_channels, hidden_layers, input_scale)
        _check_mask(mask, initial_sigma, threshold, penalize_mask, crop_every)
        self.causal = causal
        self.hidden_channels = hidden_channels
        self.hidden_layers = hidden_layers
        self.input_scale = input_scale
        self.mask = mask
        self.initial_sigma = initial_sigma
        self.threshold = threshold
        self.penalize_mask = penalize_mask
        self.crop_every = crop_every
        self._made_size, self._made_padding = self.kernel_size, self.padding
        self._sample_at(Fraction(1))
        self._crop: Crop | None = None
        self._steps_since_look = 0
        self._is_constrained = False
        self._create_parameters(device, dtype)
        self.reset_parameters()

    def _create_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        outputs = (self.out_channels, self.in_channels // self.groups)
        for name, shape in magnet_shapes(self.ndim, self.hidden_channels, self.hidden_layers, outputs).items():
            self.register_parameter(name, nn.Parameter(empty(shape)))
        names = ("mask_mean", "mask_sigma") if self.mask else ()
        self.geometry = nn.ParameterDict({name: nn.Parameter(empty(self.ndim)) for name in names})

    def _magnet(self) -> dict[str, Tensor]:
        names = magnet_shapes(self.ndim, self.hidden_channels, self.hidden_layers, ())
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of section 3.2 and appendix D.1; causal masks start at the newest sample, all with a pixel."""
        reset_magnet_(self._magnet(), self.input_scale)
        self._forget_crop()
        if self.mask:
            nn.init.constant_(self.geometry["mask_mean"], 1.0 if self.causal else 0.0)
            for d, smallest in enumerate(self._smallest_sigma()):
                self.geometry["mask_sigma"][d] = max(self.initial_sigma, smallest)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # ---- the kernel

    def kernel_inputs(self) -> Mapping[str, Tensor]:
        like = next(self.parameters())  # not sine_weight: under torch.fx that is a proxy
        axes = [axis.positions(*ends, like) for axis, ends in zip(self._axes, self.crop(), strict=True)]
        return {**self._magnet(), **self.geometry, **{f"coordinate_{d}": axis for d, axis in enumerate(axes)}}

    def kernel_function(self) -> Callable[..., Tensor]:
        return functools.partial(flex_kernel, threshold=self.threshold, scale=self.kernel_scale)

    def construct(self) -> Tensor:
        """The whole kernel, (C_out, C_in/groups, *kernel_size); zero where the mask is under the threshold."""
        kernel = self._construct_crop()
        cut = margins(self.crop(), self.kernel_size)
        return F.pad(kernel, [m for side in reversed(cut) for m in side]) if any(map(any, cut)) else kernel

    def _construct_crop(self) -> Tensor:
        return super().construct()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, (N, C_in, *size) or (C_in, *size), with the part of the constructed kernel that is not zero."""
        if self.training and self._is_cropped and not self._is_constrained:
            self._count_forward()
        crop = self.crop()
        kernel = self._construct_crop() if self.training else self.weight[slices(crop)]
        x, padding = self._pad_for(crop, x)
        return convolve(x, kernel, self.bias, self.stride, padding, self.groups)

    def _pad_for(self, crop: Crop, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        cut = margins(crop, self.kernel_size)
        if self.causal:
            sides = [(self.kernel_size[0] - 1 - cut[0][0], -cut[0][1])]
        else:
            x, padding = self._pad(x)
            sides = [(p - before, p - after) for p, (before, after) in zip(padding, cut, strict=True)]
        if all(before == after >= 0 for before, after in sides):
            return x, tuple(before for before, _ in sides)
        return pad_to_crop(x, sides), (0,) * self.ndim

    # ---- the crop

    def crop(self) -> Crop:
        """The part of the kernel that is convolved with, (first, last + 1) per dimension, in pixels.

        At least what the mask leaves, rounded outwards to few sizes. Exact up to that rounding on the CPU and
        outside training. In graphs that are traced or exported, and in compiled ones, the whole kernel, since they
        outlive the values of today's mask; but in compiled training from the first call of `tcc.constrain_` on,
        which then has to follow every step.
        """
        if not self._is_cropped:
            return whole(self.kernel_size)
        values = tuple(self.geometry.values())
        if not may_look(values):
            follows = torch.compiler.is_compiling() and self.training and self._is_constrained
            known = follows or all(isinstance(value, Tensor) and value.is_meta for value in values)
            return self._crop if known and self._crop is not None else whole(self.kernel_size)
        if not self.training or self._looks_every() == 1 or self._crop is None:
            self._look()
        assert self._crop is not None
        return self._crop

    @property
    def _is_cropped(self) -> bool:
        return self.mask and self.threshold > 0

    def _looks_every(self) -> int:
        if self.crop_every is not None:
            return self.crop_every
        return 1 if self.geometry["mask_mean"].device.type == "cpu" else CROP_EVERY

    def _count_forward(self) -> None:
        """Forward passes that a backward pass repeats are no steps, and have to meet the crop of the first time."""
        if may_look(self.geometry.values()) and torch._C._current_graph_task_id() == -1:
            self._count_step()

    def _count_step(self) -> None:
        self._steps_since_look += 1
        if 1 < self._looks_every() <= self._steps_since_look:
            self._look()

    def _look(self) -> None:
        """Read the mask, which makes an accelerator wait, and crop to it."""
        mean, sigma = (self.geometry[name].detach().tolist() for name in ("mask_mean", "mask_sigma"))
        if not all(map(math.isfinite, (*mean, *sigma))):
            raise ValueError(
                f"mask: mean {mean} and sigma {sigma}, expected finite numbers; go back to an earlier checkpoint,"
                " and train with gradient clipping or a lower learning rate"
            )
        rarely = self.training and self._looks_every() > 1
        now = visible(mean, sigma, self._axes, self.threshold)
        if rarely and self._crop is not None and not is_inside(now, self._crop):
            warnings.warn(
                f"a mask grew out of its crop in {self._looks_every()} training steps and was cut meanwhile: give"
                " crop_every=1, or a lower learning rate to the mask",
                RuntimeWarning,
                stacklevel=3,
            )
        margin = GROWTH if rarely else 0.0
        self._crop = crop_to_mask(mean, sigma, self._axes, self.threshold, self.causal, margin)
        self._steps_since_look = 0

    def _forget_crop(self) -> None:
        self._crop = None

    def train(self, mode: bool = True) -> Self:
        changes = mode != self.training
        super().train(mode)
        if changes:
            self._forget_crop()
            if mode and self._is_constrained and may_look(self.geometry.values()):  # compiled forwards can't look
                with contextlib.suppress(ValueError):  # what is not finite is refused where it is used
                    self._look()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if not self.output_bias.is_meta:  # there nothing can be looked at: what was seen last is kept
            self._forget_crop()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_crop()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Keep the mask's centre in the kernel, and the mask wide enough to leave a pixel of it; look at the mask."""
        if self.mask:
            self.geometry["mask_mean"].clamp_(-1, 1)
        if not self._is_cropped:
            return
        sigma = self.geometry["mask_sigma"]
        smallest = torch.tensor(self._smallest_sigma(), dtype=sigma.dtype, device=sigma.device)
        sigma.copy_(sigma.abs().clamp_(min=smallest))
        self._is_constrained = True
        if self._looks_every() == 1 or self._crop is None:
            self._look()
        else:
            self._count_step()

    def _smallest_sigma(self) -> list[float]:
        """Of a mask that leaves a pixel wherever its centre is in the kernel; 0 without a threshold."""
        if self.threshold == 0:
            return [0.0] * self.ndim
        return [NARROWEST * sigma for sigma in self._sigma_of_a_pixel(self.threshold)]

    def _sigma_of_a_pixel(self, threshold: float) -> list[float]:
        """Of a mask that is over the threshold along a pixel's width, per dimension."""
        return [0.5 / axis.half / math.sqrt(-2 * math.log(threshold)) for axis in self._axes]

    # ---- frequencies

    @property
    def nyquist_frequency(self) -> float:
        """The highest frequency that the grid can show (Eq. 24), in cycles per unit; the kernel spans two units."""
        return min(axis.extent for axis in self._axes) / 4

    def highest_frequency(self) -> float | None:
        """`max_frequency()` in cycles per pixel."""
        return None if self.sine_weight.is_meta else self.max_frequency() / min(axis.half for axis in self._axes)

    def receptive_field(self) -> tuple[int, ...]:
        """Pixels of the kernel that are convolved with."""
        return tuple(stop - first for first, stop in self.crop())

    @torch.no_grad()
    def max_frequency(self, mask: bool = True) -> float:
        """f+ (Eq. 21 and 22): the paper's estimate of the kernel's highest frequency, see `filter_frequencies`.

        In cycles per unit; the kernel spans two units.

        Args:
            mask: count what the mask adds.
        """
        frequency = filter_frequencies(self.sine_weight.float(), self.gamma.float()).sum()
        return (frequency + self._mask_frequency()).item() if mask else frequency.item()

    def _mask_frequency(self) -> Tensor:
        if not self.mask:
            return self.sine_weight.new_zeros(())
        return ENVELOPE_CUT / (2 * math.pi * self.geometry["mask_sigma"].abs().max())

    def penalty(self) -> Tensor:
        """By how much the kernel's filters exceed what the grid can show (Eq. 26, the paper's "together" form).

        The sum over the MAGNet's filters of the squared excess of each over an equal part of the Nyquist frequency.
        """
        frequencies = filter_frequencies(self.sine_weight, self.gamma)
        if self.penalize_mask:
            frequencies = frequencies + self._mask_frequency() / len(frequencies)
        return (frequencies - self.nyquist_frequency / len(frequencies)).relu().square().sum()

    # ---- resolution

    def at_resolution(self, source: int, target: int) -> Self:
        """Turn a layer for one resolution, in place, into the same function at another (Eq. 9).

        The kernel is sampled at steps source / target as large, from its centre or from the newest sample of a causal
        one, and multiplied by (source / target)^D, so that the layer sums over the same region of its input. Its size,
        and padding that is given in pixels, are rounded: the region may end up to a pixel earlier or later. Turns of a
        layer multiply exactly: one there and one back leave it as it was made.

        Args:
            source, target: sizes of the layer's input, in pixels, now and from now on.

        Returns:
            The layer.

        Raises:
            ValueError: a resolution is not positive; then nothing is changed.
        """
        for name, value in (("source", source), ("target", target)):
            if not is_positive_int(value):
                raise ValueError(f"{name}={value!r}: expected a positive int, a resolution in pixels")
        self._sample_at(self.resolution_ratio * Fraction(target, source))
        self._kept = None
        self._forget_crop()
        return self

    def _sample_at(self, ratio: Fraction) -> None:
        """The kernel's grid, factor and padding at `ratio` times the resolution that the layer was made for."""
        self.resolution_ratio = ratio
        self._axes = tuple(sampled_axis(size, ratio, self.causal) for size in self._made_size)
        self.kernel_size = tuple(axis.size for axis in self._axes)
        self.kernel_scale = float(ratio) ** -self.ndim
        if isinstance(self._made_padding, tuple) and not self.causal:
            made = zip(self._made_padding, self._made_size, self._axes, strict=True)
            self.padding = tuple(resampled_padding(padding, size, axis, ratio) for padding, size, axis in made)

    def unsaved_setting(self) -> str | None:
        if self.resolution_ratio == 1:
            return None
        return f"at {self.resolution_ratio} times the resolution that it was made for"

    # ---- to and from plain convolutions

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: FlexSpec) -> Self:
        """A FlexConv in place of `conv`, with the kernel of `spec`.

        Raises:
            ValueError: the kernel can't be centred on the old one.
        """
        settings = spec.model_dump(exclude={"method", "kernel_size"})
        return cls(**plain_arguments(conv, spec.sizes(cls.ndim)), **settings)

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv]) -> None:
        """See `ConvReplacement.fit_`: a mask that leaves exactly the old kernels, and the best kernels in it.

        Exact where the old kernels have no more than hidden_channels + 1 pixels; otherwise the best that so many
        dimensions can do, as far as the filters reach them.
        """
        require_weights(convs)
        whole_sizes = enumerate(layers[0].kernel_size)
        sizes = [max(min(k, conv.kernel_size[d]) for conv in convs) for d, k in whole_sizes]
        for layer, conv in zip(layers, convs, strict=True):
            with torch.device("cpu"):  # whatever the default is
                if layer.mask:
                    layer._mask_out_(sizes)
                layer._fit_kernel_(conv)
            copy_bias_(layer, conv)

    def _mask_out_(self, sizes: Sequence[int]) -> None:
        """A centred mask that leaves so many pixels."""
        threshold = self.threshold or THRESHOLD
        wanted = [size * sigma for size, sigma in zip(sizes, self._sigma_of_a_pixel(threshold), strict=True)]
        self.geometry["mask_mean"].zero_()
        self.geometry["mask_sigma"].copy_(torch.tensor(wanted))

    def _fit_kernel_(self, conv: PlainConv) -> None:
        old = conv.weight.detach()
        inner = [min(k, o) for k, o in zip(self.kernel_size, old.shape[2:], strict=True)]
        kept = old[slices([((o - i) // 2, (o + i) // 2) for o, i in zip(old.shape[2:], inner, strict=True)])]
        crop = self.crop()
        target = centred(kept, self.kernel_size)[slices(crop)]
        double = torch.empty(0, dtype=torch.float64)
        axes = [axis.positions(*ends, double) for axis, ends in zip(self._axes, crop, strict=True)]
        mask = torch.ones(math.prod(target.shape[2:]), dtype=torch.float64)
        if self.mask:
            mean, sigma = (self.geometry[name].double().cpu() for name in ("mask_mean", "mask_sigma"))
            mask = gaussian_mask(mean, sigma, axes, self.threshold)
        reach = [i / 2 / axis.half for i, axis in zip(inner, self._axes, strict=True)]
        fit_magnet_(self._magnet(), target, mask, axes, reach, self.nyquist_frequency)

    def to_conv(self) -> nn.Module:
        """The plain convolution with the same output, its kernel cropped; causal, after an `nn.ConstantPad1d`."""
        conv = super().to_conv()
        assert isinstance(conv, nn.Conv1d | nn.Conv2d)
        cut = margins(self.crop(), self.kernel_size)
        if self.causal:
            (before, after), size = cut[0], self.kernel_size[0]
            pad = nn.ConstantPad1d((size - 1 - before, -after), 0.0)
            return nn.Sequential(pad, _shrunk(conv, cut, conv.padding)).train(self.training)
        if isinstance(conv.padding, str):
            even = [min(side) for side in cut]
            return _shrunk(conv, [(e, e) for e in even], conv.padding)
        if self.padding == "same":  # timm's, which pads by the size of its input
            return conv
        even = [min(*side, p) for side, p in zip(cut, conv.padding, strict=True)]
        padding = tuple(p - e for p, e in zip(conv.padding, even, strict=True))
        return _shrunk(conv, [(e, e) for e in even], padding)

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        """Multiply-adds of the convolution with the cropped kernel for one sample."""
        channels = self.out_channels * self.in_channels // self.groups
        return math.prod(output_size) * channels * math.prod(end - first for first, end in self.crop())

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, hidden_channels={self.hidden_channels}, mask={self.mask}"
        text += ", padding='causal'" if self.causal else ""
        return text if self.kernel_scale == 1 else f"{text}, kernel_scale={self.kernel_scale:g}"


class FlexConv1d(_FlexConv):
    __doc__ = _FlexConv.__doc__
    ndim = 1


class FlexConv2d(_FlexConv):
    __doc__ = _FlexConv.__doc__
    ndim = 2


class FlexSpec(KernelSpec):
    """Settings of a FlexConv. Names, meanings and defaults are those of the layer's arguments."""

    layers: ClassVar[dict[int, type[ConvReplacement]]] = {1: FlexConv1d, 2: FlexConv2d}

    method: Literal["flex"] = "flex"
    hidden_channels: Annotated[int, Field(ge=1, le=1024)] = 32
    hidden_layers: Annotated[int, Field(ge=1, le=16)] = 3
    input_scale: Annotated[float, Field(gt=0, le=1e4)] = INPUT_SCALE
    mask: bool = True
    initial_sigma: Annotated[float, Field(ge=SMALLEST_SIGMA, le=100)] = INITIAL_SIGMA
    threshold: Annotated[float, Field(ge=0, lt=1)] = THRESHOLD
    penalize_mask: bool = False
    crop_every: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


def _shrunk(
    conv: nn.Conv1d | nn.Conv2d, cut: Sequence[tuple[int, int]], padding: str | Sequence[int]
) -> nn.Conv1d | nn.Conv2d:
    """A convolution without the borders of its kernel."""
    inner = conv.weight[slices([(b, k - a) for (b, a), k in zip(cut, conv.kernel_size, strict=True)])]
    new = type(conv)(
        conv.in_channels, conv.out_channels, inner.shape[2:], conv.stride, padding,  # type: ignore[arg-type]
        groups=conv.groups, bias=conv.bias is not None, padding_mode=conv.padding_mode, device="meta",
    )  # fmt: skip
    new.weight = nn.Parameter(inner.detach().clone(), requires_grad=conv.weight.requires_grad)
    new.bias = conv.bias
    return new.train(conv.training)


def _check_mask(
    mask: bool, initial_sigma: float, threshold: float, penalize_mask: bool, crop_every: int | None
) -> None:
    for name, value in (("mask", mask), ("penalize_mask", penalize_mask)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected True or False")
    if not is_number(initial_sigma) or not SMALLEST_SIGMA <= initial_sigma < math.inf:
        raise ValueError(f"initial_sigma={initial_sigma!r}: expected at least {SMALLEST_SIGMA}; half a kernel is 1")
    if not is_number(threshold) or not 0 <= threshold < 1:
        raise ValueError(
            f"threshold={threshold!r}: expected at least 0 (no cropping) and less than 1, the mask's centre"
        )
    if crop_every is not None and not is_positive_int(crop_every):
        raise ValueError(f"crop_every={crop_every!r}: expected a positive int, training steps")
