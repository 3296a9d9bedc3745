"""DepthwiseConv2d, and the settings of the recipe `engine`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ...ops import choices
from ...ops import conv as convolve
from ..core.arguments import check_counts, per_dimension
from ..core.geometry import GeometryOwner
from ..core.padding import pad_image, sides_of
from ..core.plain import PlainConv, copy_bias_, plain_arguments, plain_conv, require_weights
from ..core.replacement import FIT_TOLERANCE, ConvReplacement
from ..core.spec import LayerSpec
from ..core.tracing import as_node, is_traced

__all__ = ["DepthwiseConv2d", "EngineSpec"]


class DepthwiseConv2d(GeometryOwner, ConvReplacement, nn.Conv2d):  # type: ignore[misc]  # padding_mode: a Literal there
    """A depthwise `nn.Conv2d` that runs by the fastest algorithm on the machine, with the same results.

    It has the state dict of an `nn.Conv2d`, and is one. Where no algorithm is faster than PyTorch's own convolution,
    that runs.

    Args:
        channels: C, in and out; every channel has a kernel of its own.
        kernel_size: in pixels, an int or one per spatial dimension.
        stride: step of the convolution.
        padding: pixels on both sides, "valid" or "same" (as for `KernelConv2d`). Default: kernel_size // 2, which
            keeps the size of the image with odd kernels.
        bias: adds a learnable bias of shape (C,).
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device, dtype: of the parameters.

    Parameters:
        weight: (C, 1, *kernel_size).
        bias: (C,).

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is allowed.
    """

    method = "engine"

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_counts(channels=channels)
        rows, columns = per_dimension("kernel_size", kernel_size, 2, minimum=1)
        sizes = (rows, columns)
        super().__init__(channels, channels, sizes, groups=channels, bias=bias, device=device, dtype=dtype)
        padding = tuple(size // 2 for size in sizes) if padding is None else padding
        self._set_arguments(channels, channels, sizes, stride, padding, 1, channels, padding_mode)

    def forward(self, x: Tensor, shared: Sequence[Tensor] = ()) -> Tensor:
        """Convolve x, (N, C, H, W) or (C, H, W). `shared` is what torch.fx graphs may pass; it is not used."""
        if is_traced(x):
            return as_node(self, x)
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            sides = sides_of(padding, self.kernel_size, self.stride, x.shape[-2:])
            if self.padding_mode == "zeros" and all(before == after for before, after in sides):
                padding = tuple(before for before, _ in sides)
            else:
                x, padding = pad_image(x, sides, self.padding_mode), (0, 0)
        return convolve(x, self.weight, self.bias, self.stride, padding, self.groups)

    @property
    def geometry_owner(self) -> GeometryOwner:
        return self

    # ---- in place of a convolution, and back

    @classmethod
    def in_place_of(cls, conv: PlainConv, spec: EngineSpec) -> Self:
        arguments = plain_arguments(conv, conv.kernel_size)
        names = ("kernel_size", "stride", "padding", "bias", "padding_mode", "device", "dtype")
        return cls(conv.in_channels, **{name: arguments[name] for name in names})

    @classmethod
    @torch.no_grad()
    def fit_(cls, layers: Sequence[Self], convs: Sequence[PlainConv], tolerance: float = FIT_TOLERANCE) -> None:
        """Copy kernels and biases."""
        require_weights(convs)
        for layer, conv in zip(layers, convs, strict=True):
            layer.weight.copy_(conv.weight)
            copy_bias_(layer.bias, conv)

    def to_conv(self) -> nn.Module:
        """An `nn.Conv2d` (timm's `Conv2dSame` for padding="same" with a stride) with copies of the parameters."""
        return plain_conv(
            self.weight, self.bias, stride=self.stride, padding=self.padding, groups=self.groups,
            padding_mode=self.padding_mode,
        ).train(self.training)  # fmt: skip

    # ---- reports

    def gains(self) -> dict[str, float]:
        """How many times as long PyTorch's own convolution takes as what runs here, by pass.

        Of the images that the layer, or another like it, met last; empty if none was large enough to be measured.
        """
        found = {}
        for choice in choices():
            problem = choice.problem
            mine = (self.weight.shape, self.stride, self.weight.device, self.weight.dtype)
            theirs = (problem.weight_shape, problem.stride, problem.device, problem.dtype)
            if mine == theirs and problem.groups == self.groups and not math.isnan(choice.gain):
                found[choice.pass_] = choice.gain
        return found

    def summary(self) -> str:
        gains = self.gains()
        text = ", ".join(f"{pass_} {gains[pass_]:.2f}×" for pass_ in ("output", "input", "weight") if pass_ in gains)
        return f"{super().summary()}: {text or 'not measured yet'}"

    def multiply_adds(self, output_size: Sequence[int]) -> int:
        return math.prod(output_size) * self.weight.numel()

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text if self.bias is not None else f"{text}, bias=False"


class EngineSpec(LayerSpec):
    """Settings of `DepthwiseConv2d` in place of a convolution: none."""

    method: Literal["engine"] = "engine"

    def check_conv(self, conv: PlainConv) -> None:
        if not 1 < conv.in_channels == conv.groups == conv.out_channels:
            raise ValueError(
                f"in_channels={conv.in_channels}, out_channels={conv.out_channels}, groups={conv.groups}: expected a"
                " depthwise convolution with as many channels out as in"
            )
        plain_arguments(conv, conv.kernel_size)


EngineSpec.layers = {2: DepthwiseConv2d}
