"""What a patch promises, verified on any model."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import timm_contconv as tcc
from timm_contconv.layers import ConvReplacement

from .helpers import relative
from .models_for_tests import awake, first_tensor, layers_of, output

__all__ = ["Outcome", "check", "sample"]

SIZES = (128, 224)  # pixels of an image, the first that the model takes, before its own size


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a model under a recipe.

    Attributes:
        replaced: number of convolutions.
        refused: selected convolutions that were not replaced, by reason.
        fit_error: median of the relative kernel errors of the warm start; None without one.
        merge_error: ||merged output - patched output|| / ||patched output||; None where nothing was replaced.
    """

    replaced: int
    refused: dict[str, int]
    fit_error: float | None = None
    merge_error: float | None = None


def check(model: nn.Module, recipe: str, images: Tensor, **arguments: Any) -> Outcome:
    """Patch a model and verify what a patch promises.

    The output keeps its shape and is finite, a gradient reaches every new parameter, and the merged model has the same
    output.

    Args:
        model: any image model; it is changed.
        recipe: a recipe's name.
        images: (N, C, H, W).
        **arguments: as for `tcc.patch`.

    Raises:
        AssertionError: a promise is not kept.
    """
    shape = output(awake(model), images).shape
    try:
        tcc.patch(model, recipe, progress=False, **arguments)
    except ValueError as error:
        if "can replace none" not in str(error):
            raise
        return Outcome(0, dict(Counter(line.split(": ", 1)[1] for line in str(error).splitlines()[1:])))
    check_training(model.train(), images, shape)
    error = merge_error(model.eval(), images)
    assert error < 1e-4, f"merged output differs by {error:.1e}"
    report = tcc.report(model, input_size=images.shape[1:])
    fits = [row.fit_error for row in report.rows if row.fit_error is not None]
    fit = statistics.median(fits) if fits else None
    return Outcome(len(layers_of(model)), dict(Counter(report.refused.values())), fit, error)


def check_training(model: nn.Module, images: Tensor, shape: torch.Size) -> None:
    """A forward and a backward pass: shape, finite values, gradients."""
    out = first_tensor(model(images))
    assert out.shape == shape, f"output {tuple(out.shape)}, before {tuple(shape)}"
    assert out.isfinite().all(), "output is not finite"
    out.float().square().mean().backward()
    for name, parameter, pixels in new_parameters(model):
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        # a continuous kernel of one pixel is read at distance 0 alone, where its net's slope does not matter
        assert parameter.grad.any() or pixels == 1, f"the gradient of {name} is 0"


def merge_error(model: nn.Module, images: Tensor) -> float:
    """Relative difference of the outputs of a patched model and of the merged one."""
    return relative(output(tcc.merge(model), images), output(model, images))


def new_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
    """Parameters of the layers that a patch put in, shared ones too, and the pixels of the layer's kernel."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, ConvReplacement):
            own = [(f"{name}.{key}", parameter) for key, parameter in layer.named_parameters()]
            shared = [(f"{name}.geometry.{key}", parameter) for key, parameter in layer.geometry.items()]
            pixels = math.prod(layer.kernel_size)
            found += [(key, parameter, pixels) for key, parameter in (*own, *shared) if parameter.requires_grad]
    return found


def sample(model: nn.Module) -> Tensor:
    """Two images, small where the architecture takes any size."""
    config = model.pretrained_cfg
    channels, *size = config["input_size"]
    small = [] if config.get("fixed_input_size") else [[min(pixels, s) for s in size] for pixels in SIZES]
    candidates = [*small, size]
    generator = torch.Generator().manual_seed(0)
    for height, width in candidates:
        images = torch.randn(2, channels, height, width, generator=generator)
        try:
            output(model.eval(), images)
        except (AssertionError, RuntimeError):
            if [height, width] == candidates[-1]:
                raise
        else:
            return images
    raise AssertionError(f"{type(model).__name__}: no size of images fits")
