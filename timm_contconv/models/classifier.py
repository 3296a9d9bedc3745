"""What the papers' own networks have in common: how timm asks a classifier for its head and its parameters."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import get_device_dtype
from torch import Tensor, nn

__all__ = ["Classifier", "require_nchw"]


def require_nchw(output_fmt: str) -> None:
    """Refuse intermediate features in another layout.

    Raises:
        ValueError: output_fmt is not "NCHW".
    """
    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW'")


class Classifier(nn.Module):
    """A network with features, (N, in_chans, H, W) to (N, num_features, H', W'), and a head on them.

    A subclass sets `num_classes` and `head`, a module with `reset(num_classes, global_pool, ...)`, a last linear layer
    `fc` and `forward(x, pre_logits)`, and defines `forward_features`.
    """

    num_classes: int
    head: Any

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the geometry parameters: points, masks, the hidden layers of internal nets."""
        return {name for name, _ in self.named_parameters() if ".geometry." in name}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for another number of classes (0 for none), with other pooling if given."""
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_features, H', W')."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier, (N, num_features, H', W') to (N, num_classes), or pooling only."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
