"""What the papers' own networks share: timm's methods for the head, the parameters and the features."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from timm.layers import get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers.core.replacement import undecayed_names

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """A network with features, (N, in_chans, H, W) to (N, num_features, H', W'), and a head on them.

    A subclass sets `num_classes` and `head`, a module with a last linear layer `fc`, `reset(num_classes, global_pool,
    ...)` and `forward(x, pre_logits)`. `sequence` names its `nn.Sequential` that gives features, and `feature_info`
    modules of that, such as "blocks.3". `forward_stem` comes before it, `forward_norm` after it.
    """

    sequence: ClassVar[str] = "blocks"

    num_classes: int
    num_features: int
    head_hidden_size: int
    stem: nn.Module
    head: Any
    grad_checkpointing = False
    feature_info: list[dict[str, Any]]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the geometry parameters (points, masks, the hidden layers of internal nets) and of the like."""
        return set(undecayed_names(self))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the modules' activations again in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; `num_classes` is 0 for none, `global_pool` None for the present pooling."""
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_features, H', W')."""
        x, modules = self.forward_stem(x), getattr(self, self.sequence)
        return self.forward_norm(checkpoint_seq(modules, x) if self.grad_checkpointing else modules(x))

    def forward_stem(self, x: Tensor) -> Tensor:
        """What runs before the modules that give features."""
        return self.stem(x)

    def forward_norm(self, x: Tensor) -> Tensor:
        """What runs after the modules that give features."""
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after the modules in `feature_info`.

        Args:
            x: (N, in_chans, H, W).
            indices: indices of the features, an int for the last n, or None for all.
            norm: apply the final norm, if there is one, to the features of the last module.
            stop_early: do not run the modules after the last requested one.
            output_fmt: only "NCHW".
            intermediates_only: return only the list.

        Returns:
            The final features and a list of intermediate features, (N, C, H', W') each; or only the list.

        Raises:
            ValueError: output_fmt is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW'")
        take, last_taken = feature_take_indices(len(self.feature_info), indices)
        wanted, last = {self._position(index) for index in take}, self._position(last_taken)
        modules = cast(nn.Sequential, getattr(self, self.sequence))
        intermediates, index = [], 0
        x = self.forward_stem(x)
        for index, module in enumerate(modules[: last + 1] if stop_early else modules):
            x = module(x)
            if index in wanted:
                intermediates.append(self.forward_norm(x) if norm and index == len(modules) - 1 else x)
        if intermediates_only:
            return intermediates
        return (self.forward_norm(x) if index == len(modules) - 1 else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that the given features do not need; returns the indices of the features."""
        take, last_taken = feature_take_indices(len(self.feature_info), indices)
        modules, last = cast(nn.Sequential, getattr(self, self.sequence)), self._position(last_taken)
        shortened = last < len(modules) - 1
        setattr(self, self.sequence, modules[: last + 1])
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last_taken]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def _position(self, index: int) -> int:
        """The index in the sequence of the module that gives a feature."""
        return int(self.feature_info[index]["module"].rpartition(".")[2])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier, (N, num_features, H', W') to (N, num_classes); `pre_logits`: without classifier."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
