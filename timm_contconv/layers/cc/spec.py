"""CcSpec: the settings of CC layers in recipes and configuration files."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ..core.arguments import Int
from ..core.spec import KernelSize, LayerSpec
from .merge import Conv, rounding_of

__all__ = ["CcSpec"]

LARGEST_SUPPORT = 31
LARGEST_WIDTH, MOST_LAYERS = 1024, 8

Width = Annotated[Int, Field(ge=1, le=LARGEST_WIDTH)]


class CcSpec(LayerSpec):
    """Settings of a CC layer. In place of a convolution it has the scale 1/stride and the convolution's rounding.

    In place of a transposed convolution it has the scale stride.

    Attributes:
        kernel_size: support of the kernel in input pixels, at most 31; one int for both dimensions or one each. None
            for the smallest support that holds the pixels that the replaced convolution reads.
        hidden: units of the hidden layers of the internal net, 1 to 1024 in each of at most 8 layers. None for three
            small layers that start as linear interpolation between the pixels of a kernel.
    """

    replaces_transposed: ClassVar[bool] = True
    fit_advice: ClassVar[str] = (
        "Leave kernel_size and hidden out: the default support holds the pixels that a convolution reads, and the"
        " default net reproduces any kernel."
    )

    method: Literal["cc"] = "cc"
    kernel_size: KernelSize | None = None
    hidden: Annotated[tuple[Width, ...], Field(min_length=1, max_length=MOST_LAYERS)] | None = None

    @field_validator("kernel_size")
    @classmethod
    def _check_support(cls, size: KernelSize | None) -> KernelSize | None:
        given = (size,) if isinstance(size, int) else size or ()
        if len(given) > 2 or any(pixels > LARGEST_SUPPORT for pixels in given):
            raise ValueError(f"expected at most {LARGEST_SUPPORT} pixels, one int or one each for rows and columns")
        return size

    def check_conv(self, conv: Conv) -> None:
        rounding_of(conv)
