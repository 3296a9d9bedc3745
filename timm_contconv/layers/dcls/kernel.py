"""DclsKernel, and the settings of DCLS layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.arguments import Int
from ..core.kernel import Kernel
from ..core.least_squares import pixels_needed
from ..core.plain import PlainConv, centred, kernels_inside
from ..core.replacement import FIT_TOLERANCE
from ..core.shown import Elements, Form, Quantity, one_per_output
from ..core.spec import KernelSpec
from .fit import INITIAL_SIGMA, LEFT_OUT, fit_elements
from .formula import GAUSS_MIN_WIDTH, TRIANGLE_MIN_WIDTH, Interpolation, dcls_kernel, repulsion

__all__ = ["DclsKernel", "DclsSpec"]

INITIAL_POSITION_STD = 0.5  # Appendix C
#: effective width of an element whose sigma is 0, in pixels
MIN_WIDTH = {"bilinear": 1.0, "normalized_bilinear": 1.0, "triangle": TRIANGLE_MIN_WIDTH, "gauss": GAUSS_MIN_WIDTH}


class DclsKernel(Kernel):
    """Elements that move (Khalfaoui-Hassani et al. 2023, Algorithm 1).

    Args:
        spec: settings.
        out_channels, in_channels, kernel_size, causal: as for `Kernel`.
        device, dtype: of the parameters.

    Parameters:
        weight: (C_out, C_in/groups, *dense sizes, m), m = kernel_count.
        position: (moving dimensions, *weight.shape), in pixels from the kernel centre.
        sigma: like position; for "triangle" and "gauss" only.
    """

    geometry_lr_scale: ClassVar[Mapping[str, float]] = {"position": 5.0, "sigma": 5.0}  # Appendix C
    penalises_geometry = True

    def __init__(
        self,
        spec: DclsSpec,
        out_channels: int,
        in_channels: int,
        kernel_size: Sequence[int],
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_channels, in_channels, kernel_size, causal)
        if spec.kernel_count is None:
            raise ValueError(
                "kernel_count=None: expected a positive int; tcc.patch computes it for a model, by the paper's rule"
            )
        self.kernel_count = spec.kernel_count
        self.interpolation = spec.interpolation
        self.position_dims = check_position_dims(spec.position_dims, len(self.kernel_size))
        self.moving = tuple(self.kernel_size[d] for d in self.position_dims)
        dense = (k for d, k in enumerate(self.kernel_size) if d not in self.position_dims)
        shape = (out_channels, in_channels, *dense, self.kernel_count)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.geometry_names = ("position", "sigma") if self.interpolation in INITIAL_SIGMA else ("position",)
        for name in self.geometry_names:
            value = torch.empty((len(self.moving), *shape), device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(value))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of Appendix C: weights as in `nn.Conv2d`, positions N(0, 0.5), constant widths."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.normal_(self.geometry["position"], 0, INITIAL_POSITION_STD)
        self._clamp_positions_()
        if self.interpolation in INITIAL_SIGMA:
            nn.init.constant_(self.geometry["sigma"], INITIAL_SIGMA[self.interpolation])

    @property
    def bias_bound(self) -> float:
        return 1 / math.sqrt(self.weight[0].numel())

    def function(self) -> Callable[..., Tensor]:
        dims = None if len(self.moving) == len(self.kernel_size) else self.position_dims
        return functools.partial(
            dcls_kernel, interpolation=self.interpolation, kernel_size=self.moving, position_dims=dims
        )

    def constrain_(self) -> None:
        """Clamp positions into the kernel, for elements without widths only (Appendix C)."""
        if self.interpolation not in INITIAL_SIGMA:
            self._clamp_positions_()

    def penalty(self) -> Tensor:
        """The repulsion between the kernel's elements."""
        return repulsion(self.geometry["position"])

    @torch.no_grad()
    def _clamp_positions_(self) -> None:
        for axis, size in enumerate(self.moving):
            self.geometry["position"][axis].clamp_(-(size // 2), size - 1 - size // 2)

    @classmethod
    @torch.no_grad()
    def fit_(cls, kernels: Sequence[Self], targets: Sequence[Tensor], tolerance: float = FIT_TOLERANCE) -> None:
        """Exact for "bilinear" with an element per pixel of the old kernel, otherwise a least squares fit."""
        first = kernels[0]
        problems, norms = _problems(targets, first.kernel_size, first.position_dims)
        geometry, weight = fit_elements(problems, first.moving, first.kernel_count, first.interpolation, tolerance)
        weight *= norms
        for name, value in geometry.items():
            parameter = first.geometry[name]
            parameter.copy_(value.movedim(-1, 0).view_as(parameter))
        for index, kernel in enumerate(kernels):
            kernel.weight.copy_(weight[..., index].view_as(kernel.weight))

    def summary(self) -> str:
        return f" / {self.kernel_count}"

    @torch.no_grad()
    def shown_elements(self) -> Elements | None:
        """Positions and effective widths; None if elements move along some dimensions only."""
        if len(self.moving) < len(self.kernel_size):
            return None
        position, reach = (one_per_output(value.movedim(0, -1)) for value in (self._position(), self._width()))
        centre = position.new_tensor([size // 2 for size in self.moving])
        form: Form = "ellipse" if self.interpolation == "gauss" else "box"
        return Elements(position + centre, form, reach, weight=one_per_output(self.weight.detach()))

    @torch.no_grad()
    def shown_quantities(self) -> tuple[Quantity, ...]:
        position = Quantity("distance of elements from the centre", "pixels", self._position().flatten(1).mT)
        if self.interpolation not in INITIAL_SIGMA:
            return (position,)
        return (position, Quantity("width σ of elements", "pixels", self._width().reshape(-1, 1)))

    def _position(self) -> Tensor:
        """(moving dimensions, *weight.shape), in pixels from the kernel centre."""
        return self.geometry["position"].detach().clone()

    def _width(self) -> Tensor:
        """Effective widths, like `_position`."""
        sigma = self.geometry.get("sigma", torch.zeros_like(self.geometry["position"]))
        return sigma.detach().abs() + MIN_WIDTH[self.interpolation]

    def extra_repr(self) -> str:
        text = f"kernel_count={self.kernel_count}, interpolation={self.interpolation}"
        return text if len(self.moving) == len(self.kernel_size) else f"{text}, position_dims={self.position_dims}"


class DclsSpec(KernelSpec):
    """Settings of a DCLS layer.

    Attributes:
        kernel_size: size of the constructed kernel, one int for all dimensions or one each.
        interpolation: "bilinear", "triangle" or "gauss"; "normalized_bilinear" is version "v1" of the authors' package.
        kernel_count: m, elements per kernel, at least 1. In a patch None means as many as the fit of the old kernels
            needs. From a random start, or with fit_tolerance=None, it means the parameter rule of Appendix C: the
            largest number for which the model has no more parameters than before.
        position_dims: spatial dimensions along which elements move; None means all. Along the others, every pixel of
            the kernel has `kernel_count` elements of its own.
    """

    kernel: ClassVar[type[Kernel]] = DclsKernel
    fit_advice: ClassVar[str] = (
        "Leave kernel_count out, which takes as many elements as the old kernels need, or give more; a kernel_size"
        " below the old one cuts kernels off. tcc.refit_ brings the outputs nearer with a few images."
    )

    method: Literal["dcls"] = "dcls"
    interpolation: Interpolation = "gauss"
    kernel_count: Annotated[Int, Field(ge=1, le=4096)] | None = None
    position_dims: tuple[Annotated[Int, Field(ge=0, le=2)], ...] | None = None

    def resolve(self, groups: Sequence[Sequence[PlainConv]]) -> Self:
        """Compute kernel_count by the parameter rule of Appendix C; a group's positions and widths count once."""
        if self.kernel_count is not None:
            return self
        available = sum(conv.weight.numel() for group in groups for conv in group)
        per_element = sum(self._parameters_per_element(group) for group in groups)
        if available < per_element:
            raise ValueError(
                f"kernel_count: {available} parameters in the convolutions to replace are too few for one element"
                f" per kernel ({per_element}); give kernel_count yourself"
            )
        return self.model_copy(update={"kernel_count": int(available // per_element)})

    def for_fit(self, convs: Sequence[PlainConv], tolerance: float) -> Self:
        """Take as many elements as the kernels need, at most one per pixel, if kernel_count is None."""
        if self.kernel_count is not None:
            return self
        sizes = self.sizes(len(convs[0].kernel_size))
        moving = check_position_dims(self.position_dims, len(sizes))
        problems, _ = _problems(kernels_inside(convs, sizes), sizes, moving)
        return self.model_copy(update={"kernel_count": pixels_needed(problems, LEFT_OUT * tolerance)})

    def _parameters_per_element(self, group: Sequence[PlainConv]) -> int:
        ndim = len(group[0].kernel_size)
        moving = check_position_dims(self.position_dims, ndim)
        dense = math.prod(k for d, k in enumerate(self.sizes(ndim)) if d not in moving)
        places = [conv.weight.shape[:2].numel() * dense for conv in group]
        shared_kinds = len(moving) * (2 if self.interpolation in INITIAL_SIGMA else 1)
        return sum(places) + shared_kinds * places[0]


def _problems(targets: Sequence[Tensor], kernel_size: Sequence[int], moving: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Kernels as separate problems of a fit, each with elements of its own.

    Args:
        targets: n kernels (C_out, C_in/groups, *size).
        kernel_size: of the constructed kernels.
        moving: dimensions along which elements move; the kernels get their full size along the others.

    Returns:
        (B, n, *sizes along the moving dimensions), where every kernel has a norm of 1, and the n norms before.
    """
    sizes = [k if d in moving else kernel_size[d] for d, k in enumerate(targets[0].shape[2:])]
    ends = tuple(range(-len(moving), 0))
    last = [centred(target, sizes).movedim(tuple(2 + d for d in moving), ends).double() for target in targets]
    norms = torch.stack([torch.linalg.vector_norm(kernel) for kernel in last])
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny).cpu()
    stacked = torch.stack([k.cpu() / n for k, n in zip(last, norms, strict=True)], -len(moving) - 1)
    return stacked.flatten(0, -len(moving) - 2), norms


def check_position_dims(dims: Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Dimensions along which elements move, all for None; a ValueError unless they ascend within the kernel's."""
    if dims is None:
        return tuple(range(ndim))
    if not dims or sorted(set(dims)) != list(dims) or dims[0] < 0 or dims[-1] >= ndim:
        raise ValueError(f"position_dims={dims!r}: expected ascending spatial dimensions out of 0..{ndim - 1}")
    return tuple(dims)
