"""LayerSpec: the settings of one method, as they stand in recipes and configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict

from .base import plain_arguments
from .replacement import ConvReplacement, Init, PlainConv

__all__ = ["KernelSize", "KernelSpec", "LayerSpec"]

LARGEST_KERNEL = 255


def _check_kernel_size(value: object) -> object:
    sizes = [value] if isinstance(value, int) else value
    if not isinstance(sizes, list | tuple) or not 1 <= len(sizes) <= 3 or not all(map(_is_size, sizes)):
        raise ValueError(f"expected an int from 1 to {LARGEST_KERNEL}, or one per spatial dimension")
    return value if isinstance(value, int) else tuple(sizes)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_KERNEL


#: size of a kernel in pixels, one int for all dimensions or one each; bounded, because a specification is also
#: read from a stranger's configuration
KernelSize = Annotated[int | tuple[int, ...], BeforeValidator(_check_kernel_size)]


class LayerSpec(BaseModel):
    """What a method needs to know to stand in for a convolution. One subclass per method, beside its layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: the layers of the method, by number of spatial dimensions
    layers: ClassVar[dict[int, type[ConvReplacement]]]

    method: str

    def refusal(self, conv: PlainConv) -> str | None:
        """Why this method can't stand in for `conv`, or None where it can."""
        if len(conv.kernel_size) not in self.layers:
            return f"{self.method} has no {len(conv.kernel_size)}-D layer"
        if max(conv.dilation) > 1:
            return f"dilation {conv.dilation}: only 1 can be replaced"
        return None

    def resolve(self, groups: Sequence[Sequence[PlainConv]]) -> Self:
        """Fill in what depends on the whole model.

        Args:
            groups: the convolutions to replace; those of one inner sequence will share their geometry.
        """
        return self

    def build(self, conv: PlainConv, init: Init) -> ConvReplacement:
        """The layer that stands in for `conv`."""
        return self.layers[len(conv.kernel_size)].from_conv(conv, self, init=init)


class KernelSpec(LayerSpec):
    """Settings of a method that puts a kernel of another size about the centre of the one that it replaces.

    Attributes:
        kernel_size: size of the new kernel in pixels, one int for all dimensions or one each.
    """

    kernel_size: KernelSize

    def sizes(self, ndim: int) -> tuple[int, ...]:
        """kernel_size, one int per dimension.

        Raises:
            ValueError: it has another number of them.
        """
        sizes = (self.kernel_size,) * ndim if isinstance(self.kernel_size, int) else self.kernel_size
        if len(sizes) != ndim:
            raise ValueError(f"kernel_size={self.kernel_size}: expected an int, or {ndim} of them, one per dimension")
        return sizes

    def refusal(self, conv: PlainConv) -> str | None:
        reason = super().refusal(conv)
        if reason is None:
            try:
                self.check_kernel(conv, self.sizes(len(conv.kernel_size)))
            except ValueError as error:
                return str(error)
        return reason

    def check_kernel(self, conv: PlainConv, sizes: tuple[int, ...]) -> None:
        """Raise ValueError where a kernel of these sizes has no place in `conv`."""
        plain_arguments(conv, sizes)
