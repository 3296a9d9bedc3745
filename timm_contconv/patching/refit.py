"""tcc.refit_: a warm start made better with a few images."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement
from ..progress import progress_bar
from .damage import distance
from .originals import first_images, in_eval_mode, original_convs, run
from .record import require_record

__all__ = ["can_refit", "refit_"]

Model = TypeVar("Model", bound=nn.Module)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Moments = tuple[Tensor, Tensor]  # mean and variance of every channel

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
    """Move a patched model's outputs towards those of the original with a few images, in place.

    For patches whose kernels differ from the old ones, such as DCLS with a small `kernel_count`. From the first layer
    to the last, each new layer's bias is shifted so that its outputs have the mean of the original's, and each batch
    norm's statistics are set so that its outputs have the original's mean and variance. Kernels stay as they are. If
    the outputs on these images are not nearer to the original's then, nothing is changed. No labels, no gradients, and
    deterministic. Both models run in eval mode and keep their modes.

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
        ValueError: the model is not patched, or has neither batch norms nor biases to set; the original is another
            architecture; there are no images, or not of one size, or of another dtype than the model, or they are not
            finite; an activation of the original is not finite. The model is bit for bit what it was then.
    """
    if progress not in (None, True, False):
        raise TypeError(f"progress={progress!r}: expected True, False, or None for a bar on a terminal only")
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(f"images={images!r}: expected an int of at least 1")
    convs = original_convs(require_record(model), original)
    layers, norms = _biased_layers(model), _norms(model)
    if not layers and not norms:
        raise ValueError("model: nothing to refit: no new layer has a bias, and no batch norm has running statistics")
    sample = first_images(batches, images, next(model.parameters()), "batches")
    with (
        in_eval_mode(model, original),
        _restored_unless_kept(model) as keep,
        progress_bar("refitting", len(layers) + len(norms), progress) as advance,
    ):
        originals = {name: module for name, module in _norms(original).items() if name in norms}
        expected, wanted = _observe(original, convs, originals, sample)
        before = distance(original, expected, run(model, sample, "batches"))
        _match_(model, layers, originals, wanted, sample, advance)
        if distance(original, expected, run(model, sample, "batches")) < before:
            keep()
    return model


def can_refit(model: nn.Module) -> bool:
    """Whether a patched model has something that `refit_` sets."""
    return bool(_biased_layers(model) or _norms(model))


def _biased_layers(model: nn.Module) -> dict[str, ConvReplacement]:
    """The layers of the patch that have a bias, by name."""
    found = {name: model.get_submodule(name) for name in require_record(model).replaced}
    return {
        name: layer for name, layer in found.items() if isinstance(layer, ConvReplacement) and layer.bias is not None
    }


def _norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Batch norms with running statistics, by name."""
    modules = model.named_modules()
    return {name: norm for name, norm in modules if isinstance(norm, BatchNorm) and norm.running_mean is not None}


@contextlib.contextmanager
def _restored_unless_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give parameters and buffers their values back, unless the block calls what it gets."""
    tensors = [*model.parameters(), *model.buffers()]
    before = copy.deepcopy([tensor.detach() for tensor in tensors])
    try:
        yield before.clear
    finally:
        for tensor, value in zip(tensors, before, strict=False):
            tensor.copy_(value)


def _observe(
    original: nn.Module,
    convs: dict[str, nn.Conv1d | nn.Conv2d | nn.Conv3d],
    norms: dict[str, BatchNorm],
    images: Tensor,
) -> tuple[Tensor, dict[str, Moments]]:
    """The original's output, and moments of its convolutions' outputs and of its norms' inputs, by module name."""
    moments: dict[str, Moments] = {}

    def see(name: str, values: Tensor) -> None:
        if wrong := int((~values.isfinite()).sum()):
            raise ValueError(
                f"original: {wrong} of {values.numel()} outputs of {name} are NaN or infinite, expected finite"
            )
        moments[name] = _moments(values)

    with contextlib.ExitStack() as handles:
        for name, conv in convs.items():
            handles.enter_context(conv.register_forward_hook(lambda _, __, y, name=name: see(name, y)))
        for name, norm in norms.items():
            hook = norm.register_forward_pre_hook(lambda _, x, name=name: moments.update({name: _moments(x[0])}))
            handles.enter_context(hook)
        return run(original, images, "batches"), moments


def _moments(x: Tensor) -> Moments:
    variance, mean = torch.var_mean(x.double(), dim=[0, *range(2, x.ndim)], correction=0)
    return mean, variance


def _match_(
    model: nn.Module,
    layers: dict[str, ConvReplacement],
    originals: dict[str, BatchNorm],
    wanted: dict[str, Moments],
    images: Tensor,
    advance: Callable[[], object],
) -> None:
    """Run the model once; each bias and each batch norm is set when its turn comes."""

    def set_bias(layer: ConvReplacement, name: str, y: Tensor) -> Tensor:
        assert layer.bias is not None
        shift = (wanted[name][0] - _moments(y)[0]).to(layer.bias.dtype)
        layer.bias += shift
        advance()
        return y + shift.to(y.dtype).view(-1, *[1] * (y.ndim - 2))

    def set_norm(norm: BatchNorm, name: str, x: Tensor) -> None:
        _match_moments_(norm, originals[name], _moments(x), wanted[name])
        advance()

    with contextlib.ExitStack() as handles:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda layer, _, y, name=name: set_bias(layer, name, y))
            handles.enter_context(hook)
        for name in originals:
            norm = model.get_submodule(name)
            handles.enter_context(norm.register_forward_pre_hook(lambda norm, x, name=name: set_norm(norm, name, x[0])))
        run(model, images, "batches")


def _match_moments_(norm: BatchNorm, original: BatchNorm, now: Moments, wanted: Moments) -> None:
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
