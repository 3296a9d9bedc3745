"""The kernel of a FlexConv (Romero et al. 2022), its frequencies, and its settings."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, StrictBool, ValidationInfo, field_validator
from torch import Tensor, nn

from ..core.arguments import Int
from ..core.kernel import Kernel
from ..core.padding import pad_image
from ..core.plain import PlainConv, centred
from ..core.replacement import FIT_TOLERANCE
from ..core.spec import KernelSpec
from .fit import fit_net_
from .formula import SMALLEST_SIGMA, flex_kernel, gaussian_mask
from .magnet import ENVELOPE_CUT, GABOR_PARAMETERS
from .masked import THRESHOLD, MaskedKernel, check_steerable
from .nets import NETS, KernelNet, NetName

__all__ = ["FlexKernel", "FlexSpec"]

PenaltyForm = Literal["together", "summed"]
GammaInit = Literal["by_layer", "equal"]


class FlexKernel(MaskedKernel):
    """A network times a Gaussian mask (Romero et al. 2022, Eq. 1-9): a function over [-1, 1] per dimension.

    A `MaskedKernel` whose values inside the mask are a network's.

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
    """

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
        mask = spec.threshold, spec.initial_mean, spec.initial_sigma
        super().__init__(out_channels, in_channels, kernel_size, causal, *mask)
        ndim, outputs = len(self.kernel_size), (out_channels, in_channels)
        check_steerable(spec.steerable, ndim)
        self.kernel_net = spec.kernel_net
        self.hidden_channels = spec.hidden_channels
        self.input_scale = self.net.speed if spec.input_scale is None else spec.input_scale
        self.gammas_by_layer = self.net.by_layer if spec.gamma_init is None else spec.gamma_init == "by_layer"
        self.penalize_mask = spec.penalize_mask
        self.penalty_form = spec.penalty_form
        shapes = self.net.shapes(ndim, spec.hidden_channels, spec.hidden_layers, outputs)
        self.net_parameters = tuple(shapes)
        self.undecayed_names = tuple(name for name in shapes if name in GABOR_PARAMETERS or name.endswith("_bias"))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if spec.mask:
            self._add_mask(spec.steerable, device, dtype)

    @property
    def net(self) -> KernelNet:
        """The kind of network that generates the kernel."""
        return NETS[self.kernel_net]

    def _net(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.net_parameters}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of section 3.2 and appendix D.1. Causal masks start at the newest sample."""
        self.net.reset(self._net(), self.input_scale, bool(self.gammas_by_layer))
        self._reset_mask()

    # ---- construction

    def function(self) -> Callable[..., Tensor]:
        return functools.partial(
            flex_kernel, net=self.kernel_net, speed=self.input_scale, threshold=self.threshold, scale=self.scale
        )

    def inputs(self) -> dict[str, Tensor]:
        axes = self._coordinates(self.output_bias)
        return {**super().inputs(), **{f"coordinate_{d}": axis for d, axis in enumerate(axes)}}

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

    def _fit_net_(self, target: Tensor) -> None:
        cut = self.margins or ((0, 0),) * len(self.axes)
        inside = pad_image(centred(target, self.kernel_size), [(-before, -after) for before, after in cut], "zeros")
        axes = self._coordinates(torch.empty(0, dtype=torch.float64))
        envelope = torch.ones(math.prod(inside.shape[2:]), dtype=torch.float64)
        if mask := self._mask():
            mean, sigma = (value.double().cpu() for value in mask[:2])
            envelope = gaussian_mask(mean, sigma, axes, self.threshold)
        reach = [size / 2 / axis.half for size, axis in zip(target.shape[2:], self.axes, strict=True)]
        fit_net_(self._net(), self.net, self.input_scale, inside, envelope, axes, reach, self.nyquist_frequency)

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
