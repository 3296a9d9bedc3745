"""Moving downsampling from the max-pool of a network's stem to the convolutions of its first stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Rewired", "plan_stem_pool", "with_changes"]


@dataclass(frozen=True)
class Rewired:
    """A change of a module's attribute, other than the replacement of a convolution.

    Attributes:
        owner: name of the module; "" is the model itself.
        attribute: name of the attribute.
        before, after: its values: modules, strides, or None.
    """

    owner: str
    attribute: str
    before: Any
    after: Any

    @property
    def name(self) -> str:
        """Name of the attribute, from the model down."""
        return f"{self.owner}.{self.attribute}".lstrip(".")

    @property
    def is_module(self) -> bool:
        """Whether a module is exchanged, added or removed."""
        return self.before is None or isinstance(self.before, nn.Module)


def plan_stem_pool(model: nn.Module) -> tuple[Rewired, ...]:
    """Remove the max-pool of a residual network's stem; the first stage strides instead (Kobayashi 2023, Fig. 5c).

    The first block strides in the same places as the first block of the next stage: in one convolution of its
    residual path, and in the 1x1 convolution of its shortcut. A missing shortcut is added.

    Args:
        model: a network with `maxpool`, `layer1` and `layer2`, as timm's and torchvision's ResNets; it is not changed.

    Returns:
        The changes that are needed.

    Raises:
        ValueError: the model has another structure.
    """
    pool, block, example = _stem_pool(model), *(_first_block(model, stage) for stage in ("layer1", "layer2"))
    stride = pool.stride if isinstance(pool.stride, tuple) else (pool.stride, pool.stride)
    name = f"layer1.0.{_strided_convolution(model, example)}"
    changes = [
        Rewired("", "maxpool", pool, nn.Identity()),
        Rewired(name, "stride", model.get_submodule(name).stride, stride),
    ]
    if block.downsample is None:
        changes.append(Rewired("layer1.0", "downsample", None, _shortcut(block, example, stride)))
    else:
        name = "layer1.0.downsample.0"
        changes.append(Rewired(name, "stride", model.get_submodule(name).stride, stride))
    return tuple(changes)


def with_changes(convolutions: Mapping[str, _ConvNd], rewired: Sequence[Rewired]) -> dict[str, _ConvNd]:
    """The convolutions that a model will have after the changes. The given ones are not changed.

    Args:
        convolutions: by module name, in the model's order.
        rewired: the changes.
    """
    found = dict(convolutions)
    for change in rewired:
        if isinstance(change.after, nn.Module):
            added = change.after.named_modules(prefix=f"{change.owner}.{change.attribute}")
            new = {name: conv for name, conv in added if isinstance(conv, _ConvNd)}
            ahead = [name for name in found if name.startswith(f"{change.owner}.")] if new else []
            place = list(found).index(ahead[-1]) + 1 if ahead else len(found)
            items = list(found.items())
            found = dict([*items[:place], *new.items(), *items[place:]])
        elif change.owner in found:
            found[change.owner] = conv = copy.copy(found[change.owner])
            setattr(conv, change.attribute, change.after)
    return found


def _stem_pool(model: nn.Module) -> nn.MaxPool2d:
    pool = getattr(model, "maxpool", None)
    if not isinstance(pool, nn.MaxPool2d):
        raise _refusal(model, "its `maxpool` is not an nn.MaxPool2d")
    return pool


def _first_block(model: nn.Module, stage: str) -> nn.Module:
    blocks = getattr(model, stage, None)
    if not isinstance(blocks, nn.Sequential) or not hasattr(blocks[0], "downsample"):
        raise _refusal(model, f"it has no {stage!r} whose first block has a `downsample`")
    return blocks[0]


def _strided_convolution(model: nn.Module, block: nn.Module) -> str:
    """Name, inside a block, of the strided convolution of the residual path."""
    strided = [n for n, m in block.named_modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1]
    residual = [name for name in strided if not name.startswith("downsample.")]
    if len(residual) != 1 or "downsample.0" not in strided:
        raise _refusal(model, "its blocks don't stride in one convolution and in the shortcut's")
    return residual[0]


def _shortcut(block: nn.Module, example: nn.Module, stride: tuple[int, int]) -> nn.Sequential:
    """A 1x1 convolution and a norm, as in the example's shortcut, for the channels of `block`."""
    first = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
    settings: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
    out_channels = example.get_submodule("downsample.0").in_channels
    norm = example.get_submodule("downsample.1")
    assert isinstance(out_channels, int)
    devices = [first.weight.device] if first.weight.is_cuda else []
    with torch.random.fork_rng(devices):  # a plan does not change the random state
        conv = nn.Conv2d(first.in_channels, out_channels, 1, stride, bias=False, **settings)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, type(norm)(out_channels, **settings)).train(block.training)


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"stem_pool='to_stage': can't be done in this {type(model).__name__}: {reason}; expected a residual network"
        " as timm's resnet50, or a patch without stem_pool"
    )
