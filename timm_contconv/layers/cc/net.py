"""The internal net of CC layers: the kernel as a function of sub-pixel distances (Shocher et al. 2020, Block 3).

The net is a sequence of 1x1 convolutions and ReLUs, from a 2-D distance to the weights. The input of the last, linear,
layer is called features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import compute_dtype
from ..core.compilation import CompileMode, construct
from ..core.finite import require_finite
from ..core.geometry import GeometryOwner
from .interpolation import interpolating_net, interpolating_widths

__all__ = ["InternalNet", "continuous_kernels", "internal_features"]


def internal_features(rows: Tensor, columns: Tensor, **hidden: Tensor) -> Tensor:
    """Features of all pairs of a vertical and a horizontal distance.

    Args:
        rows: (A,) vertical distances g - m, in pixels.
        columns: (B,) horizontal distances.
        **hidden: weight_1 (H_1, 2), bias_1 (H_1,), weight_2 (H_2, H_1), bias_2 ...: the hidden layers.

    Returns:
        (A, B, H_last + 1): outputs of the last hidden layer, and a one for the bias of the layer after it.
    """
    first, bias = hidden["weight_1"], hidden["bias_1"]
    y = (rows.unsqueeze(1) * first[:, 0]).unsqueeze(1) + (columns.unsqueeze(1) * first[:, 1] + bias)
    y = y.relu()
    for layer in range(2, len(hidden) // 2 + 1):
        y = F.linear(y, hidden[f"weight_{layer}"], hidden[f"bias_{layer}"]).relu()
    return F.pad(y, (0, 1), value=1.0)


def continuous_kernels(
    rows: Tensor, columns: Tensor, weight: Tensor, features: Callable[..., Tensor], **hidden: Tensor
) -> Tensor:
    """The continuous kernel at all pairs of a set of vertical and a set of horizontal distances.

    Args:
        rows: (P_y, S_y) vertical distances.
        columns: (P_x, S_x) horizontal distances.
        weight: (C_out, C_in/groups, F + 1) last layer of the internal net.
        features: the layers before it, as `internal_features`.
        **hidden: parameters of these.

    Returns:
        (P_y, P_x, C_out, C_in/groups, S_y, S_x).
    """
    phi = features(rows.flatten(), columns.flatten(), **hidden)
    kernels = weight.flatten(0, 1) @ phi.flatten(0, 1).T
    kernels = kernels.view(*weight.shape[:2], *rows.shape, *columns.shape)
    return kernels.permute(2, 4, 0, 1, 3, 5).contiguous()


class InternalNet(GeometryOwner):
    """The kernel of a CC layer as a continuous function of distances.

    Args:
        out_channels: C_out.
        in_channels: C_in/groups.
        plateaus: for rows and for columns, the lowest and the highest distance of each pixel of a kernel, in the
            pixels' order; distances fall. With `hidden=None` the net starts as a kernel with these pixels.
        hidden: as for `CcSpec`.
        device, dtype: of the parameters.

    Parameters:
        weight: (C_out, C_in/groups, F + 1), the last layer: for F features, then its bias.
        weight_1, bias_1, weight_2, ...: (H_1, 2), (H_1,), (H_2, H_1), ...: the layers before it. The last H is F. They
            are the geometry.

    Raises:
        ValueError: from a forward pass, if a parameter is not finite (checked on the CPU, outside compiled graphs).
    """

    #: the hidden layers, a pure function of distances and the geometry; a subclass may replace it
    function: ClassVar[Callable[..., Tensor]] = staticmethod(internal_features)

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        plateaus: Sequence[Sequence[tuple[float, float]]],
        hidden: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        self.plateaus = plateaus
        self.support = tuple(len(axis) for axis in plateaus)
        self.hidden = None if hidden is None else tuple(hidden)
        self.compile_mode: CompileMode = "auto"
        widths = self.hidden or interpolating_widths(self.support)
        self.weight = nn.Parameter(empty(out_channels, in_channels, widths[-1] + 1))
        names = []
        for number, (inputs, units) in enumerate(zip((2, *widths), widths, strict=False), start=1):
            for name, shape in ((f"weight_{number}", (units, inputs)), (f"bias_{number}", (units,))):
                self.register_parameter(name, nn.Parameter(empty(shape)))
                names.append(name)
        self.geometry_names = tuple(names)

    @property
    def bound(self) -> float:
        """The pixels of a plain kernel start uniform in [-bound, bound], as those of `nn.Conv2d`."""
        return 1 / math.sqrt(self.weight.shape[1] * math.prod(self.support))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """With `hidden=None` the net starts as linear interpolation between the pixels of a kernel of `nn.Conv2d`.

        Otherwise hidden layers start as in `nn.Linear`, and the last one so that kernels have the variance of plain
        ones.
        """
        if self.weight.is_meta:
            return
        spread, geometry = self.bound, self.geometry
        if self.hidden is None:
            self.interpolate_(self.plateaus)
        else:
            for name, value in geometry.items():
                limit = 1 / math.sqrt(geometry[name.replace("bias", "weight")].shape[1])
                nn.init.uniform_(value, -limit, limit)
            spread /= self._feature_norm()
        nn.init.uniform_(self.weight, -spread, spread)
        self.weight[..., -1] = 0

    @torch.no_grad()
    def interpolate_(self, plateaus: Sequence[Sequence[tuple[float, float]]]) -> None:
        """Let the hidden layers interpolate linearly between other plateaus; only with `hidden=None`."""
        with torch.device("cpu"):  # whatever the default is
            start = interpolating_net(plateaus)
        for name, value in start.items():
            self.geometry[name].copy_(value)

    def _feature_norm(self) -> float:
        """Root mean square, over distances in the support, of the norm of the features."""
        device = self.weight.device
        rows, columns = (size * (torch.arange(32, device=device) / 31 - 0.5) for size in self.support)
        phi = self.features(rows, columns)
        return max(float(phi[..., :-1].square().sum(-1).mean().sqrt()), 1e-3)

    def inputs(self) -> dict[str, Tensor]:
        """All parameters by name, including shared ones, after a check that they are finite."""
        inputs: dict[str, Tensor] = {"weight": self.weight, **self.geometry}
        for name, value in inputs.items():
            require_finite(name, value)
        return inputs

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The kernel at (P_y, S_y) and (P_x, S_x) distances, (P_y, P_x, C_out, C_in/groups, S_y, S_x).

        Computed in float32 (float64 for float64 parameters), also under autocast, then cast to the parameters' dtype.
        """
        function = functools.partial(continuous_kernels, features=type(self).function)
        inputs = {"rows": rows, "columns": columns, **self.inputs()}
        return construct(function, inputs, self.weight.dtype, self.compile_mode)

    def features(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The input of the last layer at (A,) vertical and (B,) horizontal distances, in pixels.

        Returns:
            (A, B, F + 1), in float32 (float64 for float64 parameters), also under autocast.
        """
        inputs = {"rows": rows, "columns": columns, **self.geometry}
        return construct(type(self).function, inputs, compute_dtype(self.weight.dtype), mode=False)

    def extra_repr(self) -> str:
        return "" if self.hidden is None else f"hidden={self.hidden}"
