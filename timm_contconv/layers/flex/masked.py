"""A kernel on a grid, times a Gaussian mask that learns its centre and size, and the crop of such a kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...ops import is_exporting
from ..core.kept import may_look
from ..core.kernel import Kernel, Margins
from ..core.shown import Elements, Quantity
from .crop import Crop, MaskValues, margins_of_mask, margins_of_part, part_within, read_mask
from .grid import sampled_axis

__all__ = ["THRESHOLD", "MaskedKernel", "check_steerable"]

MASK_PARAMETERS = ("mask_mean", "mask_sigma", "mask_angle")
THRESHOLD = 0.1  # Fig. 7
NARROWEST = 1.01  # pixels that a constrained mask leaves: one, and a reserve for rounding, also in bfloat16


class MaskedKernel(Kernel):
    """The mask of a `FlexKernel` (Romero et al. 2022, Eq. 1), what it leaves of the kernel, and the grid of both.

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
        out_channels, in_channels, kernel_size, causal: as for `Kernel`; 1 or 2 dimensions.
        threshold, initial_mean, initial_sigma: as in `FlexSpec`.

    Parameters, once `_add_mask` was called:
        mask_mean, mask_sigma: (D,), the kernel spans -1 to 1.
        mask_angle: (1,), in radians; only if steerable.

    Attributes:
        made_size: kernel_size at the original resolution.
        resolution_ratio: the present resolution relative to the original one.
        axes: the grid of the kernel, per dimension.
        scale: factor of the kernel at its present resolution (Eq. 9).

    Raises:
        ValueError: from `look`, hence from `constrain_`, and from a forward pass on the CPU, if the mask is not finite.
    """

    geometry_lr_scale: ClassVar[Mapping[str, float]] = dict.fromkeys(MASK_PARAMETERS, 0.1)  # appendix D.2

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        kernel_size: Sequence[int],
        causal: bool,
        threshold: float,
        initial_mean: float | None,
        initial_sigma: float,
    ) -> None:
        super().__init__(out_channels, in_channels, kernel_size, causal)
        self.threshold, self.initial_mean, self.initial_sigma = threshold, initial_mean, initial_sigma
        self.made_size = self.kernel_size
        self._crop: Crop | None = None
        self._compiled_margins: Margins | None = None
        self._set_ratio(Fraction(1))

    def _add_mask(self, steerable: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Register the parameters."""
        ndim = len(self.kernel_size)
        self.geometry_names = MASK_PARAMETERS if steerable else MASK_PARAMETERS[:2]
        for name, shape in zip(self.geometry_names, ((ndim,), (ndim,), (1,)), strict=False):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _mask(self) -> tuple[Tensor, ...]:
        """Mean, sigma and, if steerable, angle of the mask, or nothing."""
        return tuple(self.geometry.values())

    def _reset_mask(self) -> None:
        """Initial values of appendix D.1. Causal masks start at the newest sample."""
        if mask := self._mask():
            mean, sigma, *angle = mask
            newest = 1.0 if self.causal else 0.0
            nn.init.constant_(mean, newest if self.initial_mean is None else self.initial_mean)
            for d, smallest in enumerate(self._smallest_sigma()):
                sigma[d] = max(self.initial_sigma, smallest)
            for value in angle:
                nn.init.zeros_(value)
        self._update_crop()

    def _mask_out_(self, sizes: Sequence[int]) -> None:
        """Set a centred mask that leaves `sizes` pixels."""
        if mask := self._mask():
            mean, sigma, *angle = mask
            for value in angle:
                value.zero_()
            a_pixel = self._sigma_of_a_pixel(self.threshold or THRESHOLD)
            mean.zero_()
            sigma.copy_(torch.tensor([size * pixel for size, pixel in zip(sizes, a_pixel, strict=True)]))

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
        if (bad := self._update_crop()) is not None:
            raise ValueError(
                f"mask: mean {bad[0]} and sigma {bad[1]}, expected finite numbers; go back to an earlier"
                " checkpoint, and train with gradient clipping or a lower learning rate"
            )

    def _update_crop(self) -> MaskValues | None:
        """Crop to the mask as it is now, if it has values.

        Returns:
            The values of a mask that is not finite, which an error in the next forward pass names; the crop stays.
        """
        mask, crop = self._mask(), self._crop
        if not (self._is_cropped and may_look(mask)):
            return None
        values = read_mask(mask)
        if not all(math.isfinite(number) for numbers in values for number in numbers):
            return values
        if crop is None or crop.values != values or not crop.is_of(mask):
            margins = margins_of_mask(values, self.axes, self.threshold, self.causal)
            self._crop = Crop.of(margins, values, mask)
        return None

    @property
    def _is_cropped(self) -> bool:
        return bool(self.geometry_names) and self.threshold > 0

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not mode:
            self._update_crop()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self._update_crop()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_crop()

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
        self._update_crop()

    def _set_ratio(self, ratio: Fraction) -> None:
        self.resolution_ratio = ratio
        self.axes = tuple(sampled_axis(size, ratio, self.causal) for size in self.made_size)
        self.kernel_size = tuple(axis.size for axis in self.axes)
        self.scale = float(ratio) ** -len(self.axes)


def check_steerable(steerable: bool, ndim: int) -> None:
    """Raise a ValueError if a mask shall be turned in one dimension."""
    if steerable and ndim != 2:
        raise ValueError(f"steerable=True: expected False in {ndim} dimension; only masks of two can be turned")
