"""No subnormal numbers in kernels: values too small to matter become 0.

Numbers under 1.2e-38 (float32) are subnormal. Some processors take a hundred times as long to multiply with one, and
PyTorch's exp takes as long to compute one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops import plain_only

__all__ = ["SMALLEST_FACTOR", "bell", "bell_", "without_subnormals"]

SMALLEST_FACTOR = 1e-12  # of a bell of height 1: products of a few such factors and a weight are not subnormal
SMALLEST_EXPONENT = math.log(SMALLEST_FACTOR) - 0.1  # exp of it is less than the smallest factor, rounded or not


def bell(exponent: Tensor) -> Tensor:
    """exp(exponent). Values up to 1e-12 are 0, and so is their gradient."""
    return F.threshold(exponent.clamp(min=SMALLEST_EXPONENT).exp(), SMALLEST_FACTOR, 0)


def bell_(exponent: Tensor) -> Tensor:
    """As `bell`, in the memory of `exponent`; for the forward pass of an autograd function.

    The numbers are those above, as literals: with dynamic=True, torch 2.10 can't compile an autograd function twice in
    one graph if it reads a global number.
    """
    return F.threshold(exponent.clamp_(min=-27.731).exp_(), 1e-12, 0, inplace=True)


def without_subnormals(kernel: Tensor) -> Tensor:
    """A kernel with values under 1e-30 set to 0. NaN stays.

    The gradient is that of the kernel as it was, so that parameters that start at 0 learn. Under the transforms of
    torch.func and in exported graphs the kernel stays as it is.
    """
    if plain_only():
        return kernel
    values: Tensor = _WithoutSubnormals.apply(kernel)
    return values


class _WithoutSubnormals(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return F.hardshrink(values, 1e-30)  # the product with an image is not subnormal; a literal, as in `bell_`

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
