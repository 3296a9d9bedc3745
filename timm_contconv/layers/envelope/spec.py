"""EnvelopeSpec: the settings of a convolution with a Gaussian envelope."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from ..core.arguments import as_int
from ..core.spec import LARGEST_KERNEL, LayerSpec

__all__ = ["EnvelopeSpec"]


def _check_odd(value: object, largest: int = LARGEST_KERNEL) -> int:
    size = as_int(value)
    if size is None or size % 2 == 0 or not 3 <= size <= largest:
        raise ValueError(f"expected an odd int from 3 to {largest}")
    return size


OddSize = Annotated[int, BeforeValidator(lambda value: _check_odd(value))]


class EnvelopeSpec(LayerSpec):
    """Settings of a convolution with a Gaussian envelope.

    Attributes:
        envelope_size: k_g: taps of the envelope along each axis, an odd int from 3 to 255.
        inference_size: k_g outside training, at most envelope_size; None means envelope_size (Table 1e).
        order: "before" smooths the input (Eq. 2), "after" the output, before its bias is added (Eq. 5 and 6).
        sigma_per: "channel" for one width per smoothed channel, "layer" for one width per layer (Table 1d).
        initial_sigma: width at the start, 0 to 255 pixels; None for the paper's s = 0, sigma = 0.83.
        learn_sigma: False keeps the width fixed (Table 1h).
    """

    fit_advice: ClassVar[str] = (
        "Leave initial_sigma out: the fit then takes the widest envelopes that keep the kernels within the tolerance."
    )

    method: Literal["genv"] = "genv"
    envelope_size: OddSize = 9
    inference_size: OddSize | None = None
    order: Literal["before", "after"] = "before"
    sigma_per: Literal["channel", "layer"] = "channel"
    initial_sigma: Annotated[float, Field(ge=0, le=LARGEST_KERNEL)] | None = None
    learn_sigma: bool = True

    @field_validator("inference_size")
    @classmethod
    def _check_inference_size(cls, size: int | None, info: ValidationInfo) -> int | None:
        return None if size is None else _check_odd(size, info.data.get("envelope_size", LARGEST_KERNEL))

    def taps(self, training: bool) -> int:
        """k_g in training, or outside of it."""
        return self.envelope_size if training or self.inference_size is None else self.inference_size
