"""tcc.refit_: a warm start made better with a few images."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..layers import DclsKernel, KernelConv2d
from ..layers.core.least_squares import refine, solve
from ..layers.core.padding import pad_image, sides_of
from ..layers.core.plain import PlainConv, centred, margin
from .originals import first_images, original_convs, run
from .record import RECORD, require_record

__all__ = ["can_refit", "refit_"]

Model = TypeVar("Model", bound=nn.Module)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

SEED = 0
POSITIONS = 4096  # outputs per channel, over all images, that the weights of a layer are solved on
GEOMETRY_POSITIONS = 1024  # the same for the search of the geometry
GEOMETRY_STEPS = 40
LARGEST_TENSOR = 1 << 24  # numbers
PRIOR = 1e-3  # pull towards the weights so far, relative to the mean square of an element's outputs
WIDEST = 0.7  # sigma of an element that stays inside the window, in pixels
MOST_SCALING = 4.0  # of a batch norm's variance: a channel with hardly any output says little


@torch.no_grad()
def refit_(
    model: Model,
    original: nn.Module,
    batches: Tensor | Iterable[Any],
    *,
    images: int = 64,
    progress: bool | None = None,
) -> Model:
    """Move a patched model's outputs towards those of the original, layer by layer, with a few images; in place.

    For DCLS layers in place of depthwise convolutions, which need it where `kernel_count` is small: first positions and
    widths are searched for that reproduce the original's convolutions on the original's own activations. Then, from the
    first layer to the last, element weights (and biases) are solved for in closed form, so that each layer gives the
    original's outputs for the inputs that it gets in the patched model, and each batch norm's statistics are set so
    that its outputs have the original's mean and variance. Other layers stay as they are. No labels, no gradients of
    the model, and deterministic. Both models run in eval mode and keep their modes.

    Args:
        model: the patched model, soon after its patch; the closer it is to the original, the better.
        original: the model before its patch, such as a `copy.deepcopy` of it; it is not changed.
        batches: (N, C, H, W) images as the model was trained on, or an iterable of such tensors or of tuples that begin
            with one, as a DataLoader gives them.
        images: how many to use at most; all are in memory at once, with a layer's activations.
        progress: whether a progress bar is shown; None shows it on a terminal only.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: the model is not patched; the original is another architecture; there are no images, or not of one
            size, or of another dtype than the model, or they are not finite; an activation of the original is not
            finite. The model is bit for bit what it was then.
    """
    if progress not in (None, True, False):
        raise TypeError(f"progress={progress!r}: expected True, False, or None for a bar on a terminal only")
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(f"images={images!r}: expected an int of at least 1")
    record = require_record(model)
    convs = original_convs(record, original)
    layers = {name: layer for name in convs if (layer := _layer_to_refit(model, name)) is not None}
    if not layers:
        raise ValueError(
            "model: nothing to refit: only DCLS layers in place of depthwise convolutions are, and this patch has none;"
            " the fits of the other methods hardly differ from the original"
        )
    sample = first_images(batches, images, next(model.parameters()), "batches")
    columns = (TextColumn("refitting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    groups = _groups(layers)
    with (
        _in_eval_mode(model, original),
        _restored_on_error(model),
        Progress(*columns, console=Console(stderr=True), disable=hidden) as bar,
    ):
        task = bar.add_task("refit", total=len(layers) + len(groups))
        advance = functools.partial(bar.advance, task)
        observed = _observe(original, {name: convs[name] for name in layers}, layers, model, sample)
        for group in groups:
            _refit_geometry_([layers[name] for name in group], [observed.convs[name] for name in group])
            advance()
        _refit_weights_(model, layers, observed, sample, advance)
    errors = {name: cast(Any, model.get_submodule(name)).fit_error(conv) for name, conv in convs.items()}
    model.__dict__[RECORD] = dataclasses.replace(record, fit_errors=errors)
    return model


def can_refit(model: nn.Module) -> bool:
    """Whether a patched model has layers that `refit_` improves."""
    return any(_layer_to_refit(model, name) is not None for name in require_record(model).replaced)


def _layer_to_refit(model: nn.Module, name: str) -> KernelConv2d | None:
    layer = model.get_submodule(name)
    if not isinstance(layer, KernelConv2d) or not isinstance(layer.kernel, DclsKernel):
        return None
    moves_everywhere = len(layer.kernel.moving) == len(layer.kernel_size)
    plain = layer.groups == layer.in_channels and max(layer.dilation) == 1
    return layer if plain and moves_everywhere else None


def _groups(layers: dict[str, KernelConv2d]) -> list[list[str]]:
    """Names of layers that share their geometry."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.kernel.geometry["position"]), []).append(name)
    return list(groups.values())


@contextlib.contextmanager
def _in_eval_mode(*models: nn.Module) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give parameters and buffers their values back if the block fails."""
    tensors = [*model.parameters(), *model.buffers()]
    before = copy.deepcopy([tensor.detach() for tensor in tensors])
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        raise


# ---- the original's activations


@dataclasses.dataclass
class ObservedConv:
    """What a convolution of the original read and gave.

    Attributes:
        kernel: (C_out, 1, K_y, K_x).
        moments: (C_out, P, P), of the P pixels that the new kernel may use.
        outputs: (C_out, T) at the sampled places, without the bias.
    """

    kernel: Tensor
    moments: Tensor
    outputs: Tensor


@dataclasses.dataclass
class Observed:
    """Of the original: convolutions, and mean and variance of the inputs of batch norms, by module name."""

    convs: dict[str, ObservedConv]
    norms: dict[str, tuple[Tensor, Tensor]]
    originals: dict[str, BatchNorm]


def _observe(
    original: nn.Module, convs: dict[str, PlainConv], layers: dict[str, KernelConv2d], model: nn.Module, images: Tensor
) -> Observed:
    """Run the original once."""
    own = dict(model.named_modules())
    norms = {
        name: module
        for name, module in original.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None and isinstance(own.get(name), BatchNorm)
    }
    observed = Observed({}, {}, norms)

    def see_conv(name: str, conv: PlainConv, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _require_finite(name, output)
        layer, x = layers[name], inputs[0]
        places = _places(name, output.shape, POSITIONS)
        y = output[:, :, places[0], places[1]].transpose(0, 1).flatten(1).float()
        if conv.bias is not None:
            y = y - conv.bias.float()[:, None]
        few = _places(name, output.shape, GEOMETRY_POSITIONS)
        moments = [u @ u.mT / u.shape[-1] for _, u in _patches(layer, x, few, _window(layer, conv.kernel_size))]
        observed.convs[name] = ObservedConv(conv.weight.detach().float(), torch.cat(moments), y)

    def see_norm(name: str, inputs: tuple[Tensor, ...]) -> None:
        observed.norms[name] = _moments(inputs[0])

    handles = [
        conv.register_forward_hook(lambda conv, x, y, name=name: see_conv(name, conv, x, y))
        for name, conv in convs.items()
    ]
    handles += [
        norm.register_forward_pre_hook(lambda _, x, name=name: see_norm(name, x)) for name, norm in norms.items()
    ]
    try:
        run(original, images, "batches")
    finally:
        for handle in handles:
            handle.remove()
    return observed


def _require_finite(name: str, values: Tensor) -> None:
    if wrong := int((~values.isfinite()).sum()):
        raise ValueError(
            f"original: {wrong} of {values.numel()} outputs of {name} are NaN or infinite, expected finite"
        )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel."""
    variance, mean = torch.var_mean(x.double(), dim=[0, *range(2, x.ndim)], correction=0)
    return mean, variance


def _places(name: str, shape: Sequence[int], count: int) -> Tensor:
    """Rows and columns of outputs, (2, P), the same for all images; N * P is about `count`. Same name, same places."""
    images, _, height, width = shape
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(height * width, generator=generator)[: max(1, math.ceil(count / images))]
    return torch.stack((chosen // width, chosen % width))


def _patches(
    layer: KernelConv2d, x: Tensor, places: Tensor, window: Sequence[tuple[int, int]]
) -> Iterator[tuple[slice, Tensor]]:
    """What a layer reads at some outputs, within a window of its kernel: channels, and (channels, P, T) pixels."""
    sides = sides_of(layer.padding, layer.kernel_size, layer.stride, x.shape[2:])
    sides = [
        (before - first, after - (size - last))
        for (before, after), (first, last), size in zip(sides, window, layer.kernel_size, strict=True)
    ]
    sizes = [last - first for first, last in window]
    at_once = max(1, LARGEST_TENSOR // (math.prod(sizes) * places.shape[1] * len(x)))
    for first in range(0, x.shape[1], at_once):
        channels = slice(first, first + at_once)
        padded = pad_image(x[:, channels], sides, layer.padding_mode)
        view = padded.unfold(2, sizes[0], layer.stride[0]).unfold(3, sizes[1], layer.stride[1])
        read = view[:, :, places[0], places[1]]  # (N, channels, places, K_y, K_x)
        yield channels, read.flatten(3).permute(1, 3, 0, 2).flatten(2).float()


# ---- geometry


def _refit_geometry_(layers: Sequence[KernelConv2d], observed: Sequence[ObservedConv]) -> None:
    """Search positions and widths, common to layers, with which kernels give the old ones' outputs."""
    kernel = cast(DclsKernel, layers[0].kernel)
    old = observed[0].kernel.shape[2:]
    window = _window(layers[0], old)
    wanted = [_in_window(o.kernel, layers[0].kernel_size, window) for o in observed]  # (C, P) each
    energy = [((w[:, None] @ o.moments)[:, 0] * w).sum() for w, o in zip(wanted, observed, strict=True)]
    metrics = torch.stack([_regular(o.moments) / e.clamp_min(1e-30) for o, e in zip(observed, energy, strict=True)], 1)
    targets = torch.stack(wanted, 1).unsqueeze(-1)  # (C, n, P, 1)
    products = metrics @ targets

    def equations(geometry: Any) -> tuple[Tensor, Tensor]:
        basis = kernel.element_kernels(_confined(geometry, layers[0], old), window).unsqueeze(1)  # (C, 1, m, P)
        return basis @ metrics @ basis.mT, basis @ products

    start = {name: value.detach().flatten(1, 2).movedim(0, -1).float() for name, value in kernel.geometry.items()}
    units = dict.fromkeys(start, 1.0)
    with torch.inference_mode(False):
        found = refine(equations, _confined(start, layers[0], old), units, steps=GEOMETRY_STEPS)
    for name, value in _confined(found, layers[0], old).items():
        parameter = kernel.geometry[name]
        parameter.copy_(value.movedim(-1, 0).view_as(parameter))


def _regular(moments: Tensor) -> Tensor:
    """Moments plus a little of white noise: few images say nothing about some pixels, and about dead channels."""
    power = moments.diagonal(dim1=1, dim2=2).mean(1)
    noise = PRIOR * torch.maximum(power, power.mean() * PRIOR)
    return moments + torch.diag_embed(noise[:, None].expand(moments.shape[:2]))


def _window(layer: KernelConv2d, old: Sequence[int]) -> list[tuple[int, int]]:
    """First pixel of the new kernel, and the one after the last, that elements on the old kernel's pixels reach."""
    reach = 2 if "sigma" in layer.kernel.geometry_names else 1
    found = []
    for new, size in zip(layer.kernel_size, old, strict=True):
        first, size = margin(min(size, new), new), min(size, new)
        found.append((max(first - reach, 0), min(first + size + reach, new)))
    return found


def _in_window(kernel: Tensor, kernel_size: Sequence[int], window: Sequence[tuple[int, int]]) -> Tensor:
    (top, bottom), (left, right) = window
    return centred(kernel, kernel_size)[:, 0, top:bottom, left:right].flatten(1)


def _confined(geometry: Any, layer: KernelConv2d, old: Sequence[int]) -> dict[str, Tensor]:
    """Positions on the old kernels' pixels, and widths that stay inside the window. Both (C, m, D)."""
    position = geometry["position"]
    low, high = [], []
    for new, size in zip(layer.kernel_size, old, strict=True):
        first = margin(min(size, new), new) - new // 2
        low.append(float(first))
        high.append(float(first + min(size, new) - 1))
    confined = {"position": position.clamp(position.new_tensor(low), position.new_tensor(high))}
    if "sigma" in geometry:
        confined["sigma"] = geometry["sigma"].clamp(-WIDEST, WIDEST)
    return confined


# ---- weights and batch norms


def _refit_weights_(
    model: nn.Module, layers: dict[str, KernelConv2d], observed: Observed, images: Tensor, advance: Callable[[], object]
) -> None:
    """Run the model once; each layer and each batch norm is set before it runs."""
    modules = dict(model.named_modules())

    def set_layer(name: str, layer: KernelConv2d, inputs: tuple[Tensor, ...]) -> None:
        _solve_weights_(name, layer, inputs[0], observed.convs[name])
        advance()

    def set_norm(norm: BatchNorm, name: str, inputs: tuple[Tensor, ...]) -> None:
        _match_moments_(norm, observed.originals[name], _moments(inputs[0]), observed.norms[name])

    handles = [
        layer.register_forward_pre_hook(lambda layer, x, name=name: set_layer(name, layer, x))
        for name, layer in layers.items()
    ]
    handles += [
        modules[name].register_forward_pre_hook(lambda norm, x, name=name: set_norm(norm, name, x))
        for name in observed.norms
    ]
    try:
        run(model, images, "batches")
    finally:
        for handle in handles:
            handle.remove()


def _solve_weights_(name: str, layer: KernelConv2d, x: Tensor, observed: ObservedConv) -> None:
    """Set element weights, and the bias, so that the layer gives the observed outputs for x."""
    kernel = cast(DclsKernel, layer.kernel)
    old = observed.kernel.shape[2:]
    window = _window(layer, old)
    geometry = {name: value.flatten(1, 2).movedim(0, -1).float() for name, value in kernel.geometry.items()}
    basis = kernel.element_kernels(geometry, window)  # (C, m, P)
    sides = sides_of(layer.padding, layer.kernel_size, layer.stride, x.shape[2:])
    size = [
        (n + sum(side) - k) // s + 1
        for n, side, k, s in zip(x.shape[2:], sides, layer.kernel_size, layer.stride, strict=True)
    ]
    places = _places(name, (len(x), 0, *size), POSITIONS)
    weight = kernel.weight.flatten(0, 1).float()
    for channels, pixels in _patches(layer, x, places, window):
        features = basis[channels] @ pixels  # (channels, m, T)
        wanted = observed.outputs[channels]
        if layer.bias is not None:
            means = features.mean(2), wanted.mean(1)
            features, wanted = features - means[0][..., None], wanted - means[1][:, None]
        gram = features @ features.mT
        pull = PRIOR * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        before = weight[channels]
        products = (features @ wanted[..., None])[..., 0] + pull * before
        gram = gram + torch.diag_embed(pull.expand_as(before))
        weight[channels] = solve(gram.double(), products.double()[..., None])[..., 0].float()
        if layer.bias is not None:
            shift = means[1] - (weight[channels] * means[0]).sum(1)
            layer.bias[channels] += shift.to(layer.bias.dtype)
    kernel.weight.copy_(weight.view_as(kernel.weight))


def _match_moments_(
    norm: BatchNorm, original: BatchNorm, now: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]
) -> None:
    """Set the running statistics so that the outputs have the mean and the variance of the original's outputs."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert original.running_mean is not None
    assert original.running_var is not None
    scaling = (now[1] / wanted[1].clamp_min(1e-30)).clamp(1 / MOST_SCALING, MOST_SCALING)
    variance = (original.running_var.double() + original.eps) * scaling
    mean = now[0] - (wanted[0] - original.running_mean.double()) * scaling.sqrt()
    norm.running_var.copy_(variance - norm.eps)
    norm.running_mean.copy_(mean)
