"""Residual networks without pooling, in which every map has the resolution of the images (Romero et al. 2022, Fig. 10).

FlexNet has this structure, and SMPConv's network for CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..hub.build import build_model_with_cfg
from ..layers.core.arguments import as_int
from .classifier import Classifier

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "FullResolutionBlock",
    "FullResolutionNet",
    "checked_settings",
    "cifar10_cfg",
    "create",
    "full_kernel_size",
]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

#: makes a convolution from the numbers of input and output channels
ImageConv = Callable[[int, int], nn.Module]
#: makes the norm after a convolution from its number of channels
Norm = Callable[[int], nn.Module]


class FullResolutionStem(nn.Module):
    """Convolution, norm, ReLU: (N, C_in, H, W) to (N, C_out, H, W)."""

    def __init__(self, in_chs: int, out_chs: int, conv: ImageConv, norm: Norm) -> None:
        super().__init__()
        self.conv = conv(in_chs, out_chs)
        self.norm = norm(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # channels-last halves the time there, with so few channels
            x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.conv(x)).relu()


class FullResolutionBlock(nn.Module):
    """Two convolutions, each with a norm, beside a shortcut: (N, C_in, H, W) to (N, C_out, H, W).

    Args:
        in_chs, out_chs: channels; if they differ, the shortcut is a 1×1 convolution.
        conv: makes the convolutions.
        norm: makes the norms; `nn.Identity` if the convolutions have their own.
        dropout: probability, after the first ReLU.
        drop_path: stochastic depth.
        device, dtype: of the shortcut's parameters.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        conv: ImageConv,
        norm: Norm,
        dropout: float = 0.2,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = conv(in_chs, out_chs)
        self.norm1 = norm(out_chs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_chs, out_chs)
        self.norm2 = norm(out_chs)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.shortcut: nn.Module = nn.Identity() if in_chs == out_chs else nn.Conv2d(in_chs, out_chs, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm1(self.conv1(x)).relu())
        y = self.drop_path(self.norm2(self.conv2(y)))
        return (y + self.shortcut(x)).relu()


class FullResolutionNet(Classifier):
    """A stem, residual blocks, global pooling and a linear layer (Romero et al. 2022, appendix D.1).

    Features are (N, num_features, H, W).

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none.
        global_pool: pooling before the head, as in timm; "" for none.
        stem_conv, conv, norm: make the stem's convolution, the others, and the norms, as for `FullResolutionBlock`.
        dim: channels of the stem.
        width_factors: channels of the blocks relative to the stem's.
        dropout: probability in the blocks.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        device, dtype: of the other parameters.

    Raises:
        ValueError: there is no block.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        stem_conv: ImageConv,
        conv: ImageConv,
        norm: Norm,
        dim: int,
        width_factors: Sequence[float],
        dropout: float,
        drop_rate: float,
        drop_path_rate: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not width_factors:
            raise ValueError(f"width_factors={width_factors!r}: expected one factor per block, at least one")
        dd = {"device": device, "dtype": dtype}
        dims = [int(dim * factor) for factor in width_factors]
        rates = calculate_drop_path_rates(drop_path_rate, len(dims))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = FullResolutionStem(in_chans, dim, stem_conv, norm)
        widths = zip((dim, *dims), dims, rates, strict=False)
        self.blocks = nn.Sequential(*(FullResolutionBlock(i, o, conv, norm, dropout, r, **dd) for i, o, r in widths))
        self.feature_info = [{"num_chs": d, "reduction": 1, "module": f"blocks.{i}"} for i, d in enumerate(dims)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self._init_classifier()

    def _init_classifier(self) -> None:
        if isinstance(self.head.fc, nn.Linear):  # as in the released FlexNet
            nn.init.kaiming_normal_(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._init_classifier()


def full_kernel_size(img_size: int | Sequence[int]) -> tuple[int, ...]:
    """The size of the images, plus one if it is even."""
    sides = [as_int(side) or 0 for side in to_2tuple(img_size)]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"img_size={img_size!r}: expected a positive int, in pixels, or two of them")
    return tuple(side + 1 - side % 2 for side in sides)


def checked_settings(name: str, settings: Any, allowed: set[str]) -> Mapping[str, Any]:
    """Return a network's settings of its convolutions, by name; a ValueError if there are others than the allowed."""
    if not isinstance(settings, Mapping) or not allowed.issuperset(settings):
        raise ValueError(
            f"{name}={settings!r}: expected a dict of {', '.join(sorted(allowed))}; img_size gives the kernel size"
        )
    return settings


def cifar10_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's configuration of a network for CIFAR-10."""
    return {
        "num_classes": 10, "input_size": (3, 32, 32), "pool_size": None,
        "crop_pct": 1.0, "interpolation": "bilinear", "mean": CIFAR10_MEAN, "std": CIFAR10_STD,
        "first_conv": "stem.conv", "classifier": "head.fc",
        **kwargs,
    }  # fmt: skip


def create(network: Callable[..., nn.Module], variant: str, pretrained: bool, filter_fn: Any, **kwargs: Any) -> Any:
    """Build a `FullResolutionNet` with timm's builder; a feature extractor gives the features of all blocks."""
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["width_factors"]))))
    feature_cfg = {"out_indices": out_indices, "flatten_sequential": True}
    return build_model_with_cfg(
        network, variant, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs
    )
