"""FlexNet: residual networks without pooling, whose convolutions learn their size (Romero et al. 2022, Fig. 10).

The names count blocks. The paper calls FlexNet-7 also FlexNet-16, which counts layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..hub.build import build_model_with_cfg
from ..layers.core.arguments import as_int
from ..layers.flex import FlexConv2d, FlexSpec
from .checkpoint import check_keys, unwrap
from .classifier import Classifier

__all__ = ["FlexBlock", "FlexNet", "checkpoint_filter_fn", "flexnet3", "flexnet5", "flexnet7"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

# key of the release -> key of this network; the filters of a kernel are stacked
RELEASED_KEYS = (
    (r"^module\.", ""),
    (r"^cconv1\.", "stem.conv."),
    (r"^norm1\.", "stem.norm."),
    (r"^out_layer\.", "head.fc."),
    (r"\.cconv(\d)\.", r".conv\1."),
    (r"\.shortcut\.0\.", ".shortcut."),
    (r"\.Kernel\.filters\.(\d+)\.linear\.", r".kernel.sine_\1."),
    (r"\.Kernel\.filters\.(\d+)\.mu$", r".kernel.mean.\1"),
    (r"\.Kernel\.filters\.(\d+)\.gamma$", r".kernel.gamma.\1"),
    (r"\.Kernel\.linear\.(\d+)\.", r".kernel.hidden_\1."),
    (r"\.(sine|hidden)_(\d+)\.(weight|bias)$", r".\1_\3.\2"),
    (r"\.Kernel\.output_linear\.", ".kernel.output_"),
)
RELEASED_SETTINGS = (".temperature", ".mask_threshold")


class FlexStem(nn.Module):
    """FlexConv, batch norm, ReLU: (N, C_in, H, W) to (N, C_out, H, W)."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int | Sequence[int],
        device: Any = None,
        dtype: Any = None,
        **flex: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = FlexConv2d(in_chs, out_chs, kernel_size, **flex, **dd)
        self.norm = nn.BatchNorm2d(out_chs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # channels-last halves the time there, with so few channels
            x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.conv(x)).relu()


class FlexBlock(nn.Module):
    """Two FlexConvs, each with batch norm, beside a shortcut: (N, C_in, H, W) to (N, C_out, H, W).

    Args:
        in_chs, out_chs: channels; if they differ, the shortcut is a 1×1 convolution.
        kernel_size: of the FlexConvs, before their masks.
        dropout: probability, after the first ReLU.
        drop_path: stochastic depth.
        device, dtype: of the parameters.
        **flex: settings of the FlexConvs.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int | Sequence[int],
        dropout: float = 0.2,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **flex: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = FlexConv2d(in_chs, out_chs, kernel_size, **flex, **dd)
        self.norm1 = nn.BatchNorm2d(out_chs, **dd)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = FlexConv2d(out_chs, out_chs, kernel_size, **flex, **dd)
        self.norm2 = nn.BatchNorm2d(out_chs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.shortcut: nn.Module = nn.Identity() if in_chs == out_chs else nn.Conv2d(in_chs, out_chs, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm1(self.conv1(x)).relu())
        y = self.drop_path(self.norm2(self.conv2(y)))
        return (y + self.shortcut(x)).relu()


class FlexNet(Classifier):
    """FlexNet (Romero et al. 2022, appendix D.1).

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none.
        global_pool: pooling before the head, as in timm; "" for none.
        img_size: pixels of the training images, an int or (height, width). Kernels have this size, plus one if it is
            even. Other image sizes work too; `tcc.at_resolution` samples the kernels at another resolution.
        dim: channels of the stem.
        width_factors: channels of the blocks relative to the stem's.
        dropout: probability in the blocks.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        flex_args: settings of the FlexConvs by name, as in `FlexSpec` without kernel_size, and "compile".
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 32,
        dim: int = 24,
        width_factors: Sequence[float] = (1, 1, 1.5, 1.5, 1.5, 2, 2),
        dropout: float = 0.2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        flex_args: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not width_factors:
            raise ValueError(f"width_factors={width_factors!r}: expected one factor per block, at least one")
        kernel_size = _kernel_size(img_size)
        dd = {"device": device, "dtype": dtype}
        flex = {**_checked(flex_args or {}), **dd}
        dims = [int(dim * factor) for factor in width_factors]
        rates = calculate_drop_path_rates(drop_path_rate, len(dims))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.stem = FlexStem(in_chans, dim, kernel_size, **flex)
        widths = zip((dim, *dims), dims, rates, strict=False)
        self.blocks = nn.Sequential(*(FlexBlock(i, o, kernel_size, dropout, rate, **flex) for i, o, rate in widths))
        self.feature_info = [{"num_chs": d, "reduction": 1, "module": f"blocks.{i}"} for i, d in enumerate(dims)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self._init_classifier()

    def _init_classifier(self) -> None:
        if isinstance(self.head.fc, nn.Linear):  # as in the released code
            nn.init.kaiming_normal_(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._init_classifier()

    def forward_stem(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, dim, H, W)."""
        return self.stem(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_features, H, W)."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def _kernel_size(img_size: int | Sequence[int]) -> tuple[int, ...]:
    """The size of the images, plus one if it is even."""
    sides = [as_int(side) or 0 for side in to_2tuple(img_size)]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"img_size={img_size!r}: expected a positive int, in pixels, or two of them")
    return tuple(side + 1 - side % 2 for side in sides)


def _checked(flex_args: Mapping[str, Any]) -> Mapping[str, Any]:
    allowed = {*FlexSpec.model_fields, "compile"} - {"method", "kernel_size"}
    if not isinstance(flex_args, Mapping) or not allowed.issuperset(flex_args):
        raise ValueError(
            f"flex_args={flex_args!r}: expected a dict of {', '.join(sorted(allowed))}; img_size gives the kernel size"
        )
    return flex_args


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of this network, or a checkpoint of the authors, with the model's keys.

    In the authors' files, linear layers are 1×1 convolutions, and one tensor holds the mean and the width of a mask,
    rows first as here.

    Raises:
        ValueError: keys are missing or left over, or the checkpoint's kernels have another resolution than the model's.
    """
    native = unwrap(state_dict)
    if any(key.endswith(".mask_params") for key in native):
        native = _of_release(native, model)
    return check_keys(native, model)


def _of_release(released: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    native: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}  # the keys have the order of the layers
    for key, value in released.items():
        renamed = key
        for pattern, replacement in RELEASED_KEYS:
            renamed = re.sub(pattern, replacement, renamed)
        layer, _, name = renamed.rpartition(".")
        if name == "train_length":
            _check_kernel_size(key, int(value), model.get_submodule(layer))
        elif name == "mask_params":
            native[f"{layer}.kernel.mask_mean"], native[f"{layer}.kernel.mask_sigma"] = value[:, 0], value[:, 1]
        elif name.isdecimal():  # of a filter, or of the linear layer before it
            stacks.setdefault(layer, []).append(value.reshape(value.shape[:2]))
        elif not renamed.endswith(RELEASED_SETTINGS):
            native[renamed] = _in_our_shape(renamed, value, model)
    return {**native, **{name: torch.stack(values) for name, values in stacks.items()}}


def _in_our_shape(name: str, value: Tensor, model: nn.Module) -> Tensor:
    if name == "head.fc.weight":
        return value.flatten(1)  # (classes, C, 1, 1)
    if name.endswith((".output_weight", ".output_bias")):  # (C_out C_in, H, 1, 1) and (C_out C_in,)
        kernel: Any = model.get_submodule(name.rpartition(".")[0])
        return value.reshape(kernel.out_channels, -1, *value.shape[1:2])
    return value


def _check_kernel_size(key: str, size: int, layer: Any) -> None:
    """Refuse a checkpoint for another resolution. Its parameters would fit, but give another function."""
    own = layer.kernel_size[0]
    if size not in (0, own):  # 0: never run
        raise ValueError(
            f"{key}={size}: the checkpoint's kernels have {size} pixels, the model's {own};"
            f" create the model with img_size={size - 1}, then use tcc.at_resolution"
        )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """The authors' repository holds the checkpoints: load one with pretrained_cfg_overlay={"file": path}."""
    return {
        "num_classes": 10, "input_size": (3, 32, 32), "pool_size": None,
        "crop_pct": 1.0, "interpolation": "bilinear",
        "mean": CIFAR10_MEAN, "std": CIFAR10_STD,
        "first_conv": "stem.conv", "classifier": "head.fc",
        "paper_ids": "arXiv:2110.08059", "origin_url": "https://github.com/rjbruin/flexconv",
        "paper_name": "FlexConv: Continuous Kernel Convolutions with Differentiable Kernel Sizes",
        **kwargs,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({"flexnet3": _cfg(), "flexnet5": _cfg(), "flexnet7": _cfg()})


def _create_flexnet(variant: str, pretrained: bool, **kwargs: Any) -> FlexNet:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["width_factors"]))))
    return build_model_with_cfg(
        FlexNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "flatten_sequential": True},
        **kwargs,
    )


@register_model
def flexnet3(pretrained: bool = False, **kwargs: Any) -> FlexNet:
    """FlexNet-3: 0.27 M parameters, 90.4 % on CIFAR-10 in the paper (Table 6)."""
    arguments: dict[str, Any] = {"dim": 24, "width_factors": (1, 1.5, 2)}
    return _create_flexnet("flexnet3", pretrained, **{**arguments, **kwargs})


@register_model
def flexnet5(pretrained: bool = False, **kwargs: Any) -> FlexNet:
    """FlexNet-5: 0.44 M parameters, 91.0 % on CIFAR-10 in the paper (Table 6)."""
    arguments: dict[str, Any] = {"dim": 22, "width_factors": (1, 1.5, 1.5, 2, 2)}
    return _create_flexnet("flexnet5", pretrained, **{**arguments, **kwargs})


@register_model
def flexnet7(pretrained: bool = False, **kwargs: Any) -> FlexNet:
    """FlexNet-7, or FlexNet-16 by its layers: 0.67 M parameters, 92.2 % on CIFAR-10 in the paper (Table 3)."""
    arguments: dict[str, Any] = {"dim": 24, "width_factors": (1, 1, 1.5, 1.5, 1.5, 2, 2)}
    return _create_flexnet("flexnet7", pretrained, **{**arguments, **kwargs})
