"""FlexConv1d and 2d: convolutions with a `FlexKernel`, at any resolution."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Self

from torch import nn

from ..core.arguments import check_counts
from ..core.kernel_conv import KernelConv, KernelConv1d, KernelConv2d
from .grid import resampled_padding
from .kernel import FlexKernel, FlexSpec

__all__ = ["FlexConv", "FlexConv1d", "FlexConv2d", "crop_alike_"]


class FlexConv(KernelConv):
    """What `FlexConv1d` and `FlexConv2d` have in common."""

    spec_class = FlexSpec
    kernel: FlexKernel

    _made_padding: tuple[int, ...] | str

    def at_resolution(self, source: int, target: int) -> Self:
        """Adapt a layer, in place, from one resolution to another (Eq. 9).

        The sampling steps of the kernel are multiplied by source / target, from its centre (causal: from the newest
        sample), and its values by (source / target)^D, so that the layer sums over the same region of its input. The
        kernel size, and padding in pixels, are rounded, so the region may end up to a pixel earlier or later. Several
        changes multiply exactly: a change and its inverse restore the layer.

        Args:
            source, target: sizes of the layer's input, in pixels, before and after the change.

        Returns:
            The layer.

        Raises:
            ValueError: a resolution is not positive, or the layer is dilated; then nothing is changed.
        """
        check_counts(source=source, target=target)
        if max(self.dilation) > 1:
            raise ValueError(f"dilation={self.dilation}: expected 1; a dilated layer stays at its resolution")
        kernel = self.kernel
        if kernel.resolution_ratio == 1:
            self._made_padding = self.padding
        kernel.sample_at(kernel.resolution_ratio * Fraction(int(target), int(source)))
        self.kernel_size = kernel.kernel_size
        if not isinstance(self._made_padding, str):
            made = zip(self._made_padding, kernel.made_size, kernel.axes, strict=True)
            self.padding = tuple(resampled_padding(*dimension, kernel.resolution_ratio) for dimension in made)
        self._kept.drop()
        return self

    def unsaved_setting(self) -> str | None:
        if self.kernel.resolution_ratio == 1:
            return None
        return f"at {self.kernel.resolution_ratio} times the resolution that it was made for"


class FlexConv1d(FlexConv, KernelConv1d):
    """`nn.Conv1d` with a `FlexKernel`: takes the arguments of `KernelConv1d` and the settings of `FlexSpec`.

    kernel_size is the size of the whole kernel, before the mask: as long as the sequence. The padding is "causal" by
    default. The kernel is zero where the mask is below its threshold. The convolution leaves out zero borders;
    `weight` is still the whole kernel.
    """

    default_padding = "causal"


class FlexConv2d(FlexConv, KernelConv2d):
    """`nn.Conv2d` with a `FlexKernel`: as `FlexConv1d`, with the arguments of `KernelConv2d`.

    kernel_size is as large as the images, or one larger to be odd. The padding is "same" by default.
    """

    default_padding = "same"


FlexSpec.layers = {1: FlexConv1d, 2: FlexConv2d}


def crop_alike_(layers: Iterable[nn.Module]) -> None:
    """Let compiled training use the same part of every kernel: the largest that a mask needs, rounded up to a quarter.

    A model is one graph, which is compiled again for every new combination of sizes. So there are at most four of them,
    however many layers there are. Eager training crops every kernel by itself.

    Args:
        layers: of one model; those that are no FlexConv, or whose margins are not known, stay as they are.
    """
    kernels = [layer.kernel for layer in layers if isinstance(layer, FlexConv)]
    parts = {kernel: part for kernel in kernels if (part := kernel.visible_part()) is not None}
    for kernel in parts:
        kernel.crop_compiled(max(parts.values()))
