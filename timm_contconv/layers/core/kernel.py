"""Kernel: parameters in, dense kernel out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from .compilation import CompileMode, construct
from .finite import require_finite
from .geometry import GeometryOwner
from .replacement import FIT_TOLERANCE
from .shown import Elements, Quantity, parameter_quantities

__all__ = ["Kernel", "Margins"]

#: pixels of a kernel that are left out before and after, per spatial dimension
Margins = tuple[tuple[int, int], ...]


class Kernel(GeometryOwner, ABC):
    """A dense kernel as a function of parameters.

    A subclass registers its parameters, names those that are geometry in `geometry_names`, and gives a pure function
    of them. This class calls the function in float32 (float64 for float64 parameters), also under autocast, and casts
    the kernel to the parameters' dtype.

    Args:
        out_channels: C_out.
        in_channels: C_in/groups.
        kernel_size: D ints, in pixels.
        causal: the last pixel of the kernel is the newest sample of a sequence.
    """

    def __init__(self, out_channels: int, in_channels: int, kernel_size: Sequence[int], causal: bool = False) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.in_channels = in_channels
        self.kernel_size = tuple(kernel_size)
        self.causal = causal
        self.compile_mode: CompileMode = "auto"

    @abstractmethod
    def function(self) -> Callable[..., Tensor]:
        """A pure function of `inputs()`, by name, that returns the dense kernel (C_out, C_in/groups, *kernel_size).

        It is a module-level function, or a `functools.partial` of one with hashable keywords, for torch.compile.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the method's paper does."""

    def sources(self) -> dict[str, Tensor]:
        """The parameters that the kernel is constructed from, by name, including shared ones."""
        own = {name: value for name, value in self._parameters.items() if value is not None}
        return {**own, **self.geometry}

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of `function()`, by name: the parameters, unless a kernel needs more.

        Raises:
            ValueError: geometry is not finite (checked on the CPU).
        """
        for name, value in self.geometry.items():
            require_finite(name, value)
        return self.sources()

    def forward(self) -> Tensor:
        """The dense kernel, (C_out, C_in/groups, *kernel_size) less `margins`; differentiable."""
        return construct(self.function(), self.inputs(), self.dtype, self.compile_mode)

    @property
    def margins(self) -> Margins | None:
        """Borders that are known to be zero, which `forward` leaves out; None if there are none."""
        return None

    def look(self) -> None:
        """Update `margins` from the parameters' values."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters and of the dense kernel."""
        return next(self.parameters()).dtype

    @property
    def bias_bound(self) -> float:
        """The bias of a convolution with this kernel starts uniform in [-bias_bound, bias_bound]."""
        return 0.0

    @classmethod
    @abstractmethod
    def fit_(cls, kernels: Sequence[Self], targets: Sequence[Tensor], tolerance: float = FIT_TOLERANCE) -> None:
        """Let kernels reproduce others, in place, as well as they can. Deterministic; exact where that is possible.

        Args:
            kernels: kernels of one geometry; several share it.
            targets: (C_out, C_in/groups, *size) kernels of one size, at most kernel_size, with the same centre.
            tolerance: relative error that is good enough; what it leaves free serves a geometry that can learn.
        """

    def constrain_(self) -> None:
        """Clamp parameters, in place, into the range that the method needs after an optimiser step."""

    def penalty(self) -> Tensor | None:
        """The method's regulariser, a scalar; None if it has none."""
        return None

    def summary(self) -> str:
        """What a report says about the kernel after its size."""
        return ""

    def highest_frequency(self) -> float | None:
        """The highest frequency in cycles per pixel; None if the kernel is not band-limited, or without values."""
        return None

    def shown_elements(self) -> Elements | None:
        """The elements that pictures draw over the kernel; None if it has none."""
        return None

    def shown_quantities(self) -> tuple[Quantity, ...]:
        """Numbers about the geometry whose distributions pictures show: the parameters, unless a kernel says more."""
        return parameter_quantities(self.geometry)
