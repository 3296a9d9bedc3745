"""Convolution with large kernels between all channels of a group, by discrete Fourier transforms: custom operators."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import autocast, dense_dft, dense_fft, plain
from .autocast import autocast_dtype
from .costs import predict
from .fft import axes_of
from .problem import (
    as_format,
    check,
    compute_dtype,
    in_format,
    kind_misfit,
    memory_format,
    new_tensor,
    output_size,
    per_dimension,
    size_misfit,
)

__all__ = ["chosen_conv", "dense_cost_key", "dense_features", "fft_conv", "has_choice", "is_cheaper_by_fft"]

# Below this many taps, by spatial dimensions, nobody wins by transforms, and the question costs more than the answer
# is worth.
_FEWEST_TAPS = {1: 65, 2: 25, 3: 65}
# In exported graphs, which other programs read: there an operator of our own has to gain more.
_FEWEST_TAPS_EXPORTED = 65
# Measured beside float32, which also stands for float64.
_MEASURED_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# The longest line that is transformed by a matrix product.
_LONGEST_LINE = 192
# What PyTorch may round to inside float32 matrix products on the CPU.
_matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def fft_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d`, `conv2d` or `conv3d` by discrete Fourier transforms, for large kernels.

    On the CPU, transforms of images of up to about 128 pixels a side are matrix products, others are FFTs. They run in
    float32 (float64 for float64). Differentiable to any order, and one operator in compiled and exported graphs. Under
    the transforms of torch.func and in forward mode it is PyTorch's own convolution.

    Args:
        x: (N, C_in, *size).
        weight: (C_out, C_in/groups, *kernel).
        bias: (C_out,), or None.
        stride, padding: an int, or one per spatial dimension; zeros are padded on both sides.
        groups: number of blocks of channels that are convolved apart.

    Returns:
        (N, C_out, *output_size), with the dtype and the memory format of `x`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or kernels are larger than padded images.
    """
    dims = weight.ndim - 2
    stride, padding = per_dimension(stride, dims), per_dimension(padding, dims)
    check(x, weight, bias, stride, padding, groups)
    if plain.is_transformed():
        return plain.convolution(x, weight, bias, stride, padding, groups)
    return _with_bias(_convolve(x, weight, stride, padding, groups, True), bias)


def chosen_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """`fft_conv` or PyTorch's convolution, chosen when it runs: one operator in graphs, whose sizes may change."""
    return _with_bias(_convolve(x, weight, stride, padding, groups, False), bias)


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(out.dtype).reshape(-1, *[1] * (out.ndim - 2))


# ------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("timm_contconv::fft_conv", mutates_args=())
def _convolve(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int, forced: bool
) -> Tensor:
    chosen = _chosen(x, weight, stride, padding, groups, forced)
    if chosen == "pytorch":
        return as_format(plain.convolution(x, weight, None, stride, padding, groups), x)
    if chosen == "dft":
        return as_format(dense_dft.output(x, weight, stride, padding), x)
    return as_format(dense_fft.output(x, weight, stride, padding, groups), x)


@torch.library.custom_op("timm_contconv::fft_conv_input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    forced: bool,
) -> Tensor:
    x = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, *input_size)
    chosen = _chosen(x, weight, stride, padding, groups, forced)
    if chosen == "pytorch":
        out = plain.input_gradient(grad, weight, input_size, stride, padding, groups)
    elif chosen == "dft":
        out = dense_dft.input_gradient(grad, weight, input_size, stride, padding)
    else:
        out = dense_fft.input_gradient(grad, weight, input_size, stride, padding, groups)
    return in_format(out, grad.dtype, _format(channels_last, grad.ndim))


@torch.library.custom_op("timm_contconv::fft_conv_weight_gradient", mutates_args=())
def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    forced: bool,
) -> Tensor:
    weight = x.new_empty(1).expand(grad.shape[1], x.shape[1] // groups, *kernel_size)
    chosen = _chosen(x, weight, stride, padding, groups, forced)
    if chosen == "pytorch":
        return plain.weight_gradient(grad, x, kernel_size, stride, padding, groups).contiguous()
    if chosen == "dft":
        return dense_dft.weight_gradient(grad, x, kernel_size, stride, padding)
    return dense_fft.weight_gradient(grad, x, kernel_size, stride, padding, groups)


def _chosen(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int, forced: bool) -> str:
    """What runs: "pytorch" where it is faster, if that is asked, and for no images; or else "dft" or "fft"."""
    if not x.numel() or not (forced or is_cheaper_by_fft(x, weight, None, stride, padding, groups)):
        return "pytorch"
    exact = x.is_cpu and _is_exact(x.dtype)
    return _transform(x.shape[2:], weight.shape[2:], stride, padding, groups, exact)


def _transform(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    exact: bool,
) -> str:
    """ "dft" where transforms are matrix products, which have to be exact, or else "fft"."""
    if not exact or len(size) != 2 or groups != 1:
        return "fft"
    longest = max(a.shortest for a in axes_of(size, kernel_size, stride, padding))
    return "dft" if longest <= _LONGEST_LINE else "fft"


def _is_exact(dtype: torch.dtype) -> bool:
    """Whether matrix products on the CPU have the precision of transforms: bfloat16 or TF32 inside would ruin them."""
    return compute_dtype(dtype) == torch.float64 or _matmul.fp32_precision in ("none", "ieee")


def _format(channels_last: bool, ndim: int) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int, forced: bool) -> Tensor:
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding)
    return new_tensor(x, (x.shape[0], weight.shape[0], *size))


@_input_gradient.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    channels_last: bool,
    stride: Any,
    padding: Any,
    groups: int,
    forced: bool,
) -> Tensor:
    form = _format(channels_last, grad.ndim)
    size = (grad.shape[0], weight.shape[1] * groups, *input_size)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=form)


@_weight_gradient.register_fake
def _(
    grad: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Any, padding: Any, groups: int, forced: bool
) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1] // groups, *kernel_size))


# ------------------------------------------------------------------------------------------------- gradients
# Each operator is linear in two tensors, so the gradients of the three are again among the three. A backward may run
# under a transform that its forward was not under.


def _to_output(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int, forced: bool
) -> Tensor:
    if plain.is_transformed():
        return plain.convolution(x, weight, None, stride, padding, groups)
    return _convolve(x, weight, stride, padding, groups, forced)


def _to_x(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    forced: bool,
) -> Tensor:
    size = x.shape[2:]
    if plain.is_transformed():
        return plain.input_gradient(grad, weight, size, stride, padding, groups)
    channels_last = memory_format(x) is not torch.contiguous_format
    return _input_gradient(grad, weight, size, channels_last, stride, padding, groups, forced)


def _to_weight(
    grad: Tensor,
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    forced: bool,
) -> Tensor:
    if plain.is_transformed():
        return plain.weight_gradient(grad, x, size, stride, padding, groups)
    return _weight_gradient(grad, x, size, stride, padding, groups, forced)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.geometry = inputs[-4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    to_x = _to_x(grad, weight, x, *ctx.geometry) if need_x else None
    to_weight = _to_weight(grad, x, weight.shape[2:], *ctx.geometry) if need_weight else None
    return to_x, to_weight, None, None, None, None


def _input_backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    need_grad, need_weight = ctx.needs_input_grad[:2]
    to_grad = _to_output(x, weight, *ctx.geometry) if need_grad else None
    to_weight = _to_weight(grad, x, weight.shape[2:], *ctx.geometry) if need_weight else None
    return to_grad, to_weight, None, None, None, None, None, None


def _weight_backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    to_grad = _to_output(x, weight, *ctx.geometry) if need_grad else None
    to_x = _to_x(grad, weight, x, *ctx.geometry) if need_x else None
    return to_grad, to_x, None, None, None, None, None


_convolve.register_autograd(_backward, setup_context=_save)
_input_gradient.register_autograd(_input_backward, setup_context=_save)
_weight_gradient.register_autograd(_weight_backward, setup_context=_save)
autocast.register("fft_conv", _convolve)


# FLOPs are counted as for the convolution that these stand for.


@register_flop_formula(torch.ops.timm_contconv.fft_conv)
def _(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@register_flop_formula(torch.ops.timm_contconv.fft_conv_input_gradient)
def _(grad: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * math.prod(weight[1:])


@register_flop_formula(torch.ops.timm_contconv.fft_conv_weight_gradient)
def _(grad: Any, x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * math.prod(out_shape[1:])


# ---------------------------------------------------------------------------------------------------- choice


def has_choice(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether `fft_conv` may be the faster one, by what does not change with the size of images."""
    if not _is_measured(x, weight, bias):
        return False
    return size_misfit(x.shape, weight.shape, _shape(bias), stride, padding, groups) is None


def is_cheaper_by_fft(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether the recorded costs expect `fft_conv` to be faster than PyTorch's convolution."""
    if not _is_measured(x, weight, bias):
        return False
    dtype = autocast_dtype(x) if torch.is_autocast_enabled("cpu") else x.dtype
    exact = _is_exact(dtype)
    return _is_cheaper(x.shape, weight.shape, _shape(bias), tuple(stride), tuple(padding), groups, dtype, exact)


def _is_measured(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether costs of such tensors were recorded, today on the CPU only, and nothing demands PyTorch's convolution."""
    fewest = _FEWEST_TAPS_EXPORTED if torch.compiler.is_exporting() else _FEWEST_TAPS.get(weight.ndim - 2, math.inf)
    if math.prod(weight.shape[2:]) < fewest or not x.is_cpu or plain.is_transformed():
        return False
    return kind_misfit(x, weight, bias) is None


def _shape(bias: Tensor | None) -> torch.Size | None:
    return None if bias is None else bias.shape


@lru_cache(maxsize=4096)
def _is_cheaper(
    x: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    exact: bool,
) -> bool:
    if size_misfit(x, weight, bias, stride, padding, groups) or 0 in x:
        return False
    if min(output_size(x[2:], weight[2:], stride, padding)) < 1:
        return False
    ours = _transform(x[2:], weight[2:], stride, padding, groups, exact)
    costs = predict(
        dense_cost_key(len(x) - 2, dtype), lambda name: dense_features(name, x, weight, stride, padding, groups)
    )
    return ours in costs and costs[ours] < costs["pytorch"]


def dense_cost_key(dims: int, dtype: torch.dtype) -> str:
    """The row of the cost file for convolutions between channels, forward and backward together."""
    return f"cpu/{dims}d/{_MEASURED_DTYPES.get(dtype, 'float32')}/dense"


def dense_features(
    name: str,
    x: Sequence[int],
    weight: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> tuple[float, ...]:
    """Amounts of work of "pytorch", "fft" or "dft", for x (N, C_in, *size), weight (C_out, C_in/groups, *kernel)."""
    pairs = x[0] * weight[0] * weight[1]
    if name == "pytorch":
        return (1.0, pairs * math.prod(weight[2:]) * math.prod(output_size(x[2:], weight[2:], stride, padding)))
    if name == "dft":
        return (1.0, *dense_dft.multiply_adds(x, weight, stride, padding))
    plane = math.prod(max(n + p, k) for n, k, p in zip(x[2:], weight[2:], padding, strict=True))
    transforms = (x[0] * (x[1] + weight[0]) + weight[0] * weight[1]) * plane
    return (1.0, transforms * math.log2(plane), pairs * plane)
