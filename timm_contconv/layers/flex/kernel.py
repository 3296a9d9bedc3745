"""The kernel of a FlexConv (Romero et al. 2022), its crop, its frequencies, and its settings."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, StrictBool, ValidationInfo, field_validator
from torch import Tensor, nn

from ...ops import is_exporting
from ..core.arguments import Int
from ..core.kept import may_look
from ..core.kernel import Kernel, Margins
from ..core.padding import pad_image
from ..core.plain import PlainConv, centred
from ..core.replacement import FIT_TOLERANCE
from ..core.shown import Elements, Quantity
from ..core.spec import KernelSpec
from .crop import Crop, MaskValues, margins_of_mask, margins_of_part, part_within, read_mask
from .fit import fit_magnet_
from .formula import SMALLEST_SIGMA, flex_kernel, gaussian_mask
from .grid import sampled_axis
from .last_layer import fit_last_layer_
from .magnet import ENVELOPE_CUT, GABOR_PARAMETERS
from .nets import NETS, KernelNet, NetName

__all__ = ["FlexKernel", "FlexSpec"]

MASK_PARAMETERS = ("mask_mean", "mask_sigma", "mask_angle")
PenaltyForm = Literal["together", "summed"]
GammaInit = Literal["by_layer", "equal"]
THRESHOLD = 0.1  # Fig. 7
NARROWEST = 1.01  # pixels that a constrained mask leaves: one, and a reserve for rounding, also in bfloat16


class FlexKernel(Kernel):
    """A network times a Gaussian mask (Romero et al. 2022, Eq. 1-9): a function over [-1, 1] per dimension.

    The kernel is zero where the mask is below the threshold along an axis. `margins` are the zeros at its borders,
    found when `look` last read the mask. `look` is called by `constrain_`, by `eval()`, and when parameters are drawn,
    fitted, loaded or moved; outside training on the CPU also before a forward pass. Margins are valid while the mask
    has the values that were read (on an accelerator: while its tensors are the same and were not edited; edits through
    `.data` are not noticed). Otherwise the whole kernel is constructed. Traced, exported and compiled graphs also use
    the whole kernel, because they outlive the mask's values. The exception is compiled training: from the first
    `constrain_` on it uses the margins of the last `constrain_`, rounded to quarters of the kernel, because every new
    size compiles the model again. `tcc.constrain_` gives all kernels of a model the same quarter, see `crop_alike_`. So
    call it after every step, and once before the first.

    Args:
        spec: settings.
        out_channels, in_channels, kernel_size, causal: as for `Kernel`; 1 or 2 dimensions.
        device, dtype: of the parameters.

    Parameters:
        sine_weight, mean, gamma: (L, H, D) of L = hidden_layers + 1 Gabor filters with H channels. The networks "gabor"
            (gamma (L, H)), "fourier" (no mean and gamma) and "siren" ((H, D)) have fewer.
        sine_bias: (L, H); "siren": (H,).
        hidden_weight, hidden_bias: (L - 1, H, H) and (L - 1, H); "siren": (hidden_layers - 2, H, H) and without the
            last H.
        output_weight, output_bias: (C_out, C_in/groups, H) and (C_out, C_in/groups).
        mask_mean, mask_sigma: (D,), the kernel spans -1 to 1; not with mask=False.
        mask_angle: (1,), in radians; only with steerable=True.

    Attributes:
        made_size: kernel_size at the original resolution.
        resolution_ratio: the present resolution relative to the original one.
        axes: the grid of the kernel, per dimension.
        scale: factor of the kernel at its present resolution (Eq. 9).

    Raises:
        ValueError: from `look`, hence from `constrain_`, and from a forward pass on the CPU, if the mask is not finite.
    """

    geometry_lr_scale: ClassVar[Mapping[str, float]] = dict.fromkeys(MASK_PARAMETERS, 0.1)  # appendix D.2

    output_bias: Tensor

    def __init__(
        self,
        spec: FlexSpec,
        out_channels: int,
        in_channels: int,
        kernel_size: Sequence[int],
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_channels, in_channels, kernel_size, causal)
        ndim, outputs = len(self.kernel_size), (out_channels, in_channels)
        check_steerable(spec.steerable, ndim)
        self.kernel_net = spec.kernel_net
        self.hidden_channels = spec.hidden_channels
        self.input_scale = self.net.speed if spec.input_scale is None else spec.input_scale
        self.gammas_by_layer = self.net.by_layer if spec.gamma_init is None else spec.gamma_init == "by_layer"
        self.initial_mean = spec.initial_mean
        self.initial_sigma = spec.initial_sigma
        self.threshold = spec.threshold
        self.penalize_mask = spec.penalize_mask
        self.penalty_form = spec.penalty_form
        shapes = self.net.shapes(ndim, spec.hidden_channels, spec.hidden_layers, outputs)
        self.net_parameters = tuple(shapes)
        self.undecayed_names = tuple(name for name in shapes if name in GABOR_PARAMETERS or name.endswith("_bias"))
        if spec.mask:
            mask_shapes = dict(zip(MASK_PARAMETERS, ((ndim,), (ndim,), (1,)), strict=True))
            self.geometry_names = MASK_PARAMETERS if spec.steerable else MASK_PARAMETERS[:2]
            shapes |= {name: mask_shapes[name] for name in self.geometry_names}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.made_size = self.kernel_size
        self._crop: Crop | None = None
        self._compiled_margins: Margins | None = None
        self._set_ratio(Fraction(1))

    @property
    def net(self) -> KernelNet:
        """The kind of network that generates the kernel."""
        return NETS[self.kernel_net]

    def _net(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.net_parameters}

    def _mask(self) -> tuple[Tensor, ...]:
        """Mean, sigma and, if steerable, angle of the mask, or nothing."""
        return tuple(self.geometry.values())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of section 3.2 and appendix D.1. Causal masks start at the newest sample."""
        self.net.reset(self._net(), self.input_scale, bool(self.gammas_by_layer))
        if mask := self._mask():
            mean, sigma, *angle = mask
            newest = 1.0 if self.causal else 0.0
            nn.init.constant_(mean, newest if self.initial_mean is None else self.initial_mean)
            for d, smallest in enumerate(self._smallest_sigma()):
                sigma[d] = max(self.initial_sigma, smallest)
            for value in angle:
                nn.init.zeros_(value)
        self._look_again()

    # ---- construction

    def function(self) -> Callable[..., Tensor]:
        return functools.partial(
            flex_kernel, net=self.kernel_net, speed=self.input_scale, threshold=self.threshold, scale=self.scale
        )

    def inputs(self) -> dict[str, Tensor]:
        axes = self._coordinates(self.output_bias)
        return {**super().inputs(), **{f"coordinate_{d}": axis for d, axis in enumerate(axes)}}

    def _coordinates(self, like: Tensor) -> list[Tensor]:
        """The axes of the grid within the margins."""
        cut = self.margins or ((0, 0),) * len(self.axes)
        return [
            axis.positions(before, axis.size - after, like)
            for axis, (before, after) in zip(self.axes, cut, strict=True)
        ]

    # ---- the crop

    @property
    def margins(self) -> Margins | None:
        """What the mask leaves out, rounded to few sizes; None if the mask may have changed since `look`."""
        crop, mask = self._crop, self._mask()
        if crop is None:
            return None
        if torch.compiler.is_compiling():
            holds = self.training and not is_exporting()
            return self._compiled_margins if holds else None
        holds = mask[0].is_meta or (may_look(mask) and crop.is_of(mask))
        return crop.margins if holds else None

    def look(self) -> None:
        """Read the mask and update `margins`; waits for an accelerator.

        Does nothing if there are no values: on the meta device, and in traced graphs.

        Raises:
            ValueError: the mask is not finite.
        """
        mask = self._mask()
        if self._is_cropped and may_look(mask):
            values = read_mask(mask)
            if not _is_finite(values):
                raise ValueError(
                    f"mask: mean {values[0]} and sigma {values[1]}, expected finite numbers; go back to an earlier"
                    " checkpoint, and train with gradient clipping or a lower learning rate"
                )
            self._crop_to(values)

    def _look_again(self) -> None:
        """`look` without an error: a mask that is not finite is an error of the next forward pass."""
        mask = self._mask()
        if self._is_cropped and may_look(mask) and _is_finite(values := read_mask(mask)):
            self._crop_to(values)

    def _crop_to(self, values: MaskValues) -> None:
        if self._crop is not None and self._crop.values == values and self._crop.is_of(self._mask()):
            return
        self._crop = Crop.of(self._margins_of(values), values, self._mask())

    def _margins_of(self, values: MaskValues) -> Margins:
        return margins_of_mask(values, self.axes, self.threshold, self.causal)

    @property
    def _is_cropped(self) -> bool:
        return bool(self.geometry_names) and self.threshold > 0

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not mode:
            self._look_again()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self._look_again()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look_again()

    @torch.no_grad()
    def constrain_(self) -> None:
        """Keep the mask's centre in the kernel and the mask wide enough to leave a pixel; then `look`."""
        if not (mask := self._mask()):
            return
        mean, sigma = mask[:2]
        mean.clamp_(-1, 1)
        if self._is_cropped:
            smallest = torch.tensor(self._smallest_sigma(), dtype=sigma.dtype, device=sigma.device)
            sigma.copy_(sigma.abs().clamp_(min=smallest))
            self.look()
            self.crop_compiled(self.visible_part())

    def visible_part(self) -> float | None:
        """How much of the kernel its margins leave, see `part_within`; None if they are not known."""
        margins = self.margins
        return None if margins is None else part_within(margins, self.axes, self.causal)

    def crop_compiled(self, part: float | None) -> None:
        """Let compiled training use at least this part of the kernel; the whole one for None."""
        self._compiled_margins = None if part is None else margins_of_part(part, self.axes, self.causal)

    def _smallest_sigma(self) -> list[float]:
        """Sigma of the narrowest mask that always leaves a pixel, per dimension; 0 without a threshold."""
        if self.threshold == 0:
            return [0.0] * len(self.axes)
        turned = math.sqrt(2) if len(self.geometry_names) == 3 else 1.0  # a pixel's diagonal may lie along an axis
        return [NARROWEST * turned * sigma for sigma in self._sigma_of_a_pixel(self.threshold)]

    def _sigma_of_a_pixel(self, threshold: float) -> list[float]:
        """Sigma of a mask that is above the threshold over the width of one pixel, per dimension."""
        return [0.5 / axis.half / math.sqrt(-2 * math.log(threshold)) for axis in self.axes]

    # ---- frequencies

    @property
    def nyquist_frequency(self) -> float:
        """The highest frequency that the grid can hold (Eq. 24), in cycles per unit; the kernel spans two units."""
        return min(axis.extent for axis in self.axes) / 4

    def highest_frequency(self) -> float | None:
        """`max_frequency()` in cycles per pixel; None on the meta device, and for a SIREN."""
        if self.output_bias.is_meta or self.net.frequencies is None:
            return None
        return self.max_frequency() / min(axis.half for axis in self.axes)

    @torch.no_grad()
    def max_frequency(self, mask: bool = True) -> float:
        """f+ (Eq. 21 and 22): the paper's estimate of the kernel's highest frequency, see `filter_frequencies`.

        In cycles per unit; the kernel spans two units.

        Args:
            mask: add the mask's frequency.

        Raises:
            ValueError: the kernel network is a SIREN, which has no highest frequency.
        """
        if self.net.frequencies is None:
            raise ValueError(f"kernel_net={self.kernel_net!r}: its kernels have no highest frequency")
        frequency = self.net.frequencies({name: value.float() for name, value in self._net().items()}).sum()
        return (frequency + self._mask_frequency()).item() if mask else frequency.item()

    def _mask_frequency(self) -> Tensor:
        if not (mask := self._mask()):
            return self.output_bias.new_zeros(())
        return ENVELOPE_CUT / (2 * math.pi * mask[1].abs().max())

    def penalty(self) -> Tensor | None:
        """By how much the filters' frequencies exceed the Nyquist frequency; None for a SIREN.

        "together" (Eq. 26): each filter may use an equal part of the Nyquist frequency; the sum of squared excesses.
        "summed" (Eq. 25): the squared excess of their sum.
        """
        if self.net.frequencies is None:
            return None
        frequencies = self.net.frequencies(self._net())
        if self.penalize_mask:
            frequencies = frequencies + self._mask_frequency() / len(frequencies)
        if self.penalty_form == "summed":
            return (frequencies.sum() - self.nyquist_frequency).relu().square()
        return (frequencies - self.nyquist_frequency / len(frequencies)).relu().square().sum()

    # ---- pictures

    @torch.no_grad()
    def shown_elements(self) -> Elements | None:
        """The mask as one element that all channels share; None without a mask."""
        if not (mask := self._mask()):
            return None
        centre, half = (mask[0].new_tensor([getattr(axis, key) for axis in self.axes]) for key in ("centre", "half"))
        mean, sigma, *turned = mask
        position, reach = (centre + mean * half)[None, None], (sigma.abs() * half)[None, None]
        angle = turned[0].detach()[None] if turned else None
        return Elements(position, "ellipse", reach, angle, label="mask σ")

    @torch.no_grad()
    def shown_quantities(self) -> tuple[Quantity, ...]:
        if not (mask := self._mask()):
            return ()
        mean, sigma, *_ = mask
        half = mean.new_tensor([axis.half for axis in self.axes])
        deviations = math.sqrt(-2 * math.log(self.threshold or THRESHOLD))
        size = 2 * deviations * sigma.abs() * half + 1
        longest = size.new_tensor([axis.size for axis in self.axes])
        return (
            Quantity("size of the mask", "pixels", torch.minimum(size, longest)[:, None], "Romero et al. 2022, Fig. 6"),
            Quantity("distance of the mask from the centre", "pixels", (mean * half)[None]),
        )

    # ---- resolution

    def sample_at(self, ratio: Fraction) -> None:
        """Sample the kernel at `ratio` times its original resolution; see `FlexConv2d.at_resolution`."""
        self._set_ratio(ratio)
        self._crop = self._compiled_margins = None
        self._look_again()

    def _set_ratio(self, ratio: Fraction) -> None:
        self.resolution_ratio = ratio
        self.axes = tuple(sampled_axis(size, ratio, self.causal) for size in self.made_size)
        self.kernel_size = tuple(axis.size for axis in self.axes)
        self.scale = float(ratio) ** -len(self.axes)

    # ---- warm start

    @classmethod
    @torch.no_grad()
    def fit_(cls, kernels: Sequence[Self], targets: Sequence[Tensor], tolerance: float = FIT_TOLERANCE) -> None:
        """A mask that leaves the size of the old kernels, and the best kernels inside it.

        A MAGNet is exact if the old kernels have at most hidden_channels + 1 pixels; otherwise an approximation with as
        many dimensions. Of the other networks only the last layer is solved for.
        """
        with torch.device("cpu"):  # whatever the default is
            for kernel, target in zip(kernels, targets, strict=True):
                kernel._mask_out_(target.shape[2:])
            for kernel, target in zip(kernels, targets, strict=True):
                kernel.look()
                kernel._fit_net_(target)

    def _mask_out_(self, sizes: Sequence[int]) -> None:
        """Set a centred mask that leaves `sizes` pixels."""
        if mask := self._mask():
            mean, sigma, *angle = mask
            for value in angle:
                value.zero_()
            a_pixel = self._sigma_of_a_pixel(self.threshold or THRESHOLD)
            mean.zero_()
            sigma.copy_(torch.tensor([size * pixel for size, pixel in zip(sizes, a_pixel, strict=True)]))

    def _fit_net_(self, target: Tensor) -> None:
        cut = self.margins or ((0, 0),) * len(self.axes)
        inside = pad_image(centred(target, self.kernel_size), [(-before, -after) for before, after in cut], "zeros")
        axes = self._coordinates(torch.empty(0, dtype=torch.float64))
        envelope = torch.ones(math.prod(inside.shape[2:]), dtype=torch.float64)
        if mask := self._mask():
            mean, sigma = (value.double().cpu() for value in mask[:2])
            envelope = gaussian_mask(mean, sigma, axes, self.threshold)
        if self.kernel_net != "magnet":
            fit_last_layer_(self._net(), self.net, inside, envelope, axes, self.input_scale)
            return
        reach = [size / 2 / axis.half for size, axis in zip(target.shape[2:], self.axes, strict=True)]
        fit_magnet_(self._net(), inside, envelope, axes, reach, self.nyquist_frequency)

    def extra_repr(self) -> str:
        text = f"hidden_channels={self.hidden_channels}, mask={bool(self.geometry_names)}"
        text = text if self.kernel_net == "magnet" else f"kernel_net={self.kernel_net}, {text}"
        return text if self.scale == 1 else f"{text}, scale={self.scale:g}"


class FlexSpec(KernelSpec):
    """Settings of a FlexConv.

    Attributes:
        kernel_size: size of the whole kernel, before the mask, one int for all dimensions or one each.
        kernel_net: what generates the kernel (Tables 1-3): "magnet"; "gabor", with isotropic envelopes (Eq. 5);
            "fourier", without envelopes (both of Fathony et al. 2021); "siren" (Sitzmann et al. 2020).
        hidden_channels: H, of the network.
        hidden_layers: linear layers between the filters of the network, which has one filter more; of a SIREN the
            number of all its linear layers, at least 2.
        input_scale: speed of the network's initial sines, omega of a SIREN. None for 25.6 (appendix D.1), 30 for a
            SIREN.
        gamma_init: "by_layer" draws the envelopes' widths in layer l from Gamma(6 / l, 1) (section 3.2), "equal" from
            Gamma(6 / L, 1) in all (Fathony et al. 2021). None for "by_layer" in a MAGNet, "equal" in a Gabor network.
        penalty_form: "together" (Eq. 26) or "summed" (Eq. 25), see `FlexKernel.penalty`.
        mask: False for no mask, as in CKConv; the settings below then have no effect.
        initial_mean: the mask's centre at the start, from -1 to 1 in all dimensions: -1 is the first element of a
            sequence, the best for noise-padded sequences (section 5). None for 0, causal 1.
        steerable: a mask with a learned angle, in two dimensions (appendix D.3).
        initial_sigma: the mask's width at the start; half a kernel is 1 (appendix D.1). A mask too narrow to leave a
            pixel starts at the smallest width that `constrain_` allows.
        threshold: the kernel is zero where the mask is below it (Fig. 7); 0 for no cropping.
        penalize_mask: add the mask's frequency in the penalty (Eq. 26); the paper does so in one experiment.
    """

    kernel: ClassVar[type[Kernel]] = FlexKernel
    fit_advice: ClassVar[str] = (
        "Give more hidden_channels: with one less than the pixels of an old kernel the fit is exact; a kernel_size"
        " below the old one cuts kernels off."
    )

    method: Literal["flex"] = "flex"
    kernel_net: NetName = "magnet"
    hidden_channels: Annotated[Int, Field(ge=1, le=1024)] = 32
    hidden_layers: Annotated[Int, Field(ge=1, le=16)] = 3
    input_scale: Annotated[float, Field(gt=0, le=1e4)] | None = None
    gamma_init: GammaInit | None = None
    penalty_form: PenaltyForm = "together"
    mask: StrictBool = True
    initial_mean: Annotated[float, Field(ge=-1, le=1)] | None = None
    steerable: StrictBool = False
    initial_sigma: Annotated[float, Field(ge=SMALLEST_SIGMA, le=100)] = 0.125
    threshold: Annotated[float, Field(ge=0, lt=1)] = THRESHOLD
    penalize_mask: StrictBool = False

    @field_validator("gamma_init")
    @classmethod
    def _check_gamma_init(cls, value: GammaInit | None, info: ValidationInfo) -> GammaInit | None:
        net = info.data.get("kernel_net", "magnet")
        if value is not None and NETS[net].by_layer is None:
            raise ValueError(f"expected None with kernel_net={net!r}, which has no envelopes")
        return value

    def check_conv(self, conv: PlainConv) -> None:
        super().check_conv(conv)
        check_steerable(self.steerable, len(conv.kernel_size))


def check_steerable(steerable: bool, ndim: int) -> None:
    """Raise a ValueError if a mask shall be turned in one dimension."""
    if steerable and ndim != 2:
        raise ValueError(f"steerable=True: expected False in {ndim} dimension; only masks of two can be turned")


def _is_finite(values: MaskValues) -> bool:
    return all(math.isfinite(number) for numbers in values for number in numbers)
