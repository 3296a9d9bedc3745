"""What the exchange of a convolution does to a model's outputs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..layers import ConvReplacement
from .originals import in_eval_mode, original_convs, run
from .record import require_record

__all__ = ["Damage", "distance", "measure_damage"]


@dataclasses.dataclass(frozen=True)
class Damage:
    """How far a patch moves a model's outputs from those of the original.

    Attributes:
        measure: "KL" for logits (N, classes): the mean Kullback-Leibler divergence of the original's probabilities from
            the new ones, in nats; "relative" for other outputs: ||new - old|| / ||old||.
        layers: of the exchange of each convolution alone, by module name. A layer whose convolution the patch also gave
            another stride, or whose place did not exist, is left out.
        whole: of all of them together.
        kept: the part of the images whose largest logit is the same; None for other outputs.
    """

    measure: str
    layers: dict[str, float]
    whole: float
    kept: float | None

    @property
    def sum(self) -> float:
        """Of the layers; near `whole` where they do not interact."""
        return sum(self.layers.values())


@torch.no_grad()
def measure_damage(model: nn.Module, original: nn.Module, images: Tensor) -> Damage:
    """Compare the outputs of a patched model, and of the original with one exchanged layer at a time.

    Both models run in eval mode, and keep their modes. Nothing is changed; a hook on each convolution of the original
    gives the layer's output instead of the convolution's.

    Args:
        model: the patched model.
        original: the model before its patch.
        images: (N, C, H, W).

    Raises:
        TypeError, ValueError: as `original_convs` and `run`.
    """
    record = require_record(model)
    convs = original_convs(record, original)
    rewired = {change.name.removesuffix(".stride") for change in record.rewired}
    with in_eval_mode(model, original):
        expected = run(original, images, "images")
        layers = {
            name: distance(original, expected, _with_layer(original, conv, model.get_submodule(name), images))
            for name, conv in convs.items()
            if name not in rewired
        }
        whole = run(model, images, "images")
        logits = _gives_logits(original, expected)
        return Damage(
            measure="KL" if logits else "relative",
            layers=layers,
            whole=distance(original, expected, whole),
            kept=(expected.argmax(1) == whole.argmax(1)).double().mean().item() if logits else None,
        )


def _with_layer(original: nn.Module, conv: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """The original's output with another layer in the place of a convolution."""
    assert isinstance(layer, ConvReplacement)
    with conv.register_forward_hook(lambda _, inputs, __: layer(*inputs)):
        return run(original, images, "images")


def distance(original: nn.Module, expected: Tensor, output: Tensor) -> float:
    """How far outputs are from those of the original: see `Damage.measure`."""
    if _gives_logits(original, expected):
        new, old = (values.double().log_softmax(1) for values in (output, expected))
        return nn.functional.kl_div(new, old, reduction="batchmean", log_target=True).item()
    size = torch.linalg.vector_norm(expected.double()).clamp_min(torch.finfo(torch.float64).tiny)
    return (torch.linalg.vector_norm((output - expected).double()) / size).item()


def _gives_logits(original: nn.Module, output: Tensor) -> bool:
    """Whether the output is (N, classes); a timm model without classes gives features."""
    return output.ndim == 2 and output.shape[1] > 1 and getattr(original, "num_classes", None) != 0
