"""Merged models: their plain convolutions as values of a configuration, and back.

A merged model has no layer of this package, but its convolutions have other sizes than those of its base. Their sizes
depend on what was learned (a mask cuts kernels, a width of zero needs no smoothing), so the configuration names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from ..layers.core.plain import PlainConv, has_same_padding, plain_conv
from ..layers.core.replacement import CONV_ATTRIBUTES
from ..layers.core.spec import explain
from ..patching.record import MERGED, MergedRecord

__all__ = ["describe_merged", "rebuild_merged"]

Channels = Annotated[int, Field(ge=1, le=2**16)]
Sizes = Annotated[list[Annotated[int, Field(ge=1, le=1023)]], Field(min_length=2, max_length=2)]
Padding = Annotated[list[Annotated[int, Field(ge=0, le=1023)]], Field(min_length=2, max_length=2)]


class MergedConv(BaseModel):
    """A plain convolution, as `nn.Conv2d` and timm's `Conv2dSame` have these arguments."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    in_channels: Channels
    out_channels: Channels
    kernel_size: Sizes
    stride: Sizes
    padding: Padding | Literal["same"]
    dilation: Sizes
    groups: Channels
    bias: bool
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    def build(self) -> PlainConv:
        """The convolution, with values that are to be loaded."""
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"groups={self.groups}: expected a divisor of {self.in_channels} and {self.out_channels}")
        return plain_conv(
            torch.empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size, requires_grad=True),
            torch.empty(self.out_channels, requires_grad=True) if self.bias else None,
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
            padding_mode=self.padding_mode,
        )  # fmt: skip


_TABLE: TypeAdapter[dict[str, list[MergedConv]]] = TypeAdapter(
    dict[str, list[MergedConv]], config=ConfigDict(defer_build=True)
)


def describe_merged(model: nn.Module, record: MergedRecord) -> dict[str, list[dict[str, Any]]]:
    """The convolutions that stand for each layer of the patch, one after another, by module name.

    Raises:
        ValueError: one was exchanged for something else.
    """
    table = {}
    for name in record.names:
        module = model.get_submodule(name)
        steps = list(module) if isinstance(module, nn.Sequential) else [module]
        convs = [step for step in steps if isinstance(step, nn.Conv2d)]
        if len(convs) < len(steps):
            raise ValueError(
                f"model: {name} is a {type(module).__name__}, no merged convolution: it was changed since; save the"
                " state_dict() with safetensors"
            )
        table[name] = [_describe(conv) for conv in convs]
    return table


def _describe(conv: nn.Conv2d) -> dict[str, Any]:
    """The values of a `MergedConv`."""
    values = {name: getattr(conv, name) for name in CONV_ATTRIBUTES}
    return {**values, "padding": "same" if has_same_padding(conv) else conv.padding, "bias": conv.bias is not None}


def rebuild_merged(model: nn.Module, table: Mapping[str, Any]) -> None:
    """Put the described convolutions in the place of those of a merged model, in place.

    Raises:
        ValueError: the table does not fit the model, or a value is out of range.
    """
    try:
        described = _TABLE.validate_python(table)
    except ValidationError as error:
        raise ValueError("\n".join(explain(item, "merged: ") for item in error.errors()[:5])) from None
    names = model.__dict__[MERGED].names
    if described.keys() != set(names):
        raise ValueError(f"merged: describes {', '.join(described)}; expected the patch's layers, {', '.join(names)}")
    for name, steps in described.items():
        layer = model.get_submodule(name)
        if not steps or (layer.in_channels, layer.out_channels) != (steps[0].in_channels, steps[-1].out_channels):
            raise ValueError(
                f"merged: {name} has {layer.in_channels} input and {layer.out_channels} output channels where timm"
                " builds the model, and others in its description; a merged model keeps the in_chans that it was saved"
                " with"
            )
        convs = [step.build() for step in steps]
        merged: nn.Module = convs[0] if len(convs) == 1 else nn.Sequential(*convs)
        if len(convs) > 1:  # models read these attributes of their convolutions
            for attribute in CONV_ATTRIBUTES:
                setattr(merged, attribute, getattr(layer, attribute))
        model.set_submodule(name, merged)
