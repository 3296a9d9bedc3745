"""SMPConv-T and SMPConv-B: RepLKNet's structure with self-moving points (Kim and Park 2023, section 4.3).

SMP kernels replace the large kernels of RepLKNet (Ding et al. 2022). The filters of a layer share their points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, ConvNormAct, DropPath, calculate_drop_path_rates
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..hub.build import build_model_with_cfg
from ..layers import SmpConv2d, SmpConvBn2d
from .checkpoint import native_keys, renamed
from .classifier import Classifier

__all__ = ["ConvFfn", "LargeKernelBlock", "SmpConvNet", "SmpConvStage", "smpconv_base", "smpconv_tiny"]

# key of the SMPConv release -> key of this file
_SMPCONV_KEYS = (
    (r"^transitions\.0\.", "stages.1.downsample."),
    (r"^transitions\.1\.", "stages.2.downsample."),
    (r"^transitions\.2\.", "stages.3.downsample."),
    (r"\.large_kernel\.smp\.conv\.weight_coord$", ".large_kernel.conv.kernel.coordinate"),
    (r"\.large_kernel\.smp\.conv\.radius$", ".large_kernel.conv.kernel.radius"),
    (r"\.large_kernel\.smp\.conv\.weights$", ".large_kernel.conv.kernel.weight"),
    (r"\.large_kernel\.smp\.bn\.", ".large_kernel.bn."),
    (r"\.large_kernel\.small_conv\.conv\.", ".large_kernel.small_conv."),
    (r"\.large_kernel\.small_conv\.bn\.", ".large_kernel.small_bn."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

FFN_RATIO = 4
# settings of the released ImageNet code that differ from the layer's defaults
IMAGENET_POINTS: dict[str, Any] = {
    "points": "layer", "normalize": False, "coordinate_std": 0.2, "min_radius": 1e-3,
}  # fmt: skip


class LargeKernelBlock(nn.Module):
    """x + pw2(relu(large_kernel(pw1(BN(x))))), (N, C, H, W) to the same."""

    def __init__(
        self, dim: int, kernel_size: int, drop_path: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2d(dim, **dd)
        self.pw1 = ConvNormAct(dim, dim, 1, **dd)
        smp = SmpConv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False, **IMAGENET_POINTS, **dd
        )
        self.large_kernel = SmpConvBn2d(smp, small_kernel=5)
        self.lk_nonlinear = nn.ReLU()
        self.pw2 = ConvNormAct(dim, dim, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw1(self.prelkb_bn(x))
        return x + self.drop_path(self.pw2(self.lk_nonlinear(self.large_kernel(y))))


class ConvFfn(nn.Module):
    """x + pw2(gelu(pw1(BN(x)))), (N, C, H, W) to the same; 4 C hidden channels."""

    def __init__(self, dim: int, drop_path: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(dim, **dd)
        self.pw1 = ConvNormAct(dim, FFN_RATIO * dim, 1, apply_act=False, **dd)
        self.nonlinear = nn.GELU()
        self.pw2 = ConvNormAct(FFN_RATIO * dim, dim, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.nonlinear(self.pw1(self.preffn_bn(x)))))


class SmpConvStage(nn.Module):
    """A transition (stages after the first), then pairs of a large-kernel block and a ConvFFN.

    Args:
        in_chs, out_chs: channels; if they differ, the stage starts with a transition of stride 2.
        kernel_size: of the SMP kernels, odd.
        drop_path_rates: one per pair.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        drop_path_rates: Sequence[float],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if in_chs != out_chs:
            self.downsample = nn.Sequential(
                ConvNormAct(in_chs, out_chs, 1, **dd),
                ConvNormAct(out_chs, out_chs, 3, stride=2, groups=out_chs, **dd),
            )
        blocks: list[nn.Module] = []
        for rate in drop_path_rates:
            blocks += [LargeKernelBlock(out_chs, kernel_size, rate, **dd), ConvFfn(out_chs, rate, **dd)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SmpConvNet(Classifier):
    """SMPConv's ImageNet network (Kim and Park 2023, section 4.3). Features are (N, dims[-1], H/32, W/32).

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none.
        global_pool: pooling before the head, as in timm; "" for none.
        depths: pairs of large-kernel block and ConvFFN, per stage.
        dims: channels, per stage.
        kernel_sizes: of the SMP kernels, per stage; odd.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last pair; it grows linearly from 0.
        device, dtype: of the parameters.

    Raises:
        ValueError: the stages' settings differ in number, or a kernel size is even.
    """

    sequence = "stages"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(kernel_sizes):
            raise ValueError(f"depths={depths}, dims={dims}, kernel_sizes={kernel_sizes}: expected one each per stage")
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes={kernel_sizes}: expected odd ints, so that maps keep their size")
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = _stem(in_chans, dims[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        widths = zip((dims[0], *dims), dims, strict=False)
        stages = [
            SmpConvStage(in_chs, out_chs, size, stage_rates, **dd)
            for (in_chs, out_chs), size, stage_rates in zip(widths, kernel_sizes, rates, strict=True)
        ]
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, SmpConvStage)
            stage.grad_checkpointing = enable

    def forward_norm(self, x: Tensor) -> Tensor:
        """(N, dims[-1], H/32, W/32) to the same."""
        return self.norm(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        stages = len(self.stages)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.stages) < stages:
            self.norm = nn.Identity()
        return take


def _stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(in_chans, dim, 3, stride=2, **dd),
        ConvNormAct(dim, dim, 3, groups=dim, **dd),
        ConvNormAct(dim, dim, 1, **dd),
        ConvNormAct(dim, dim, 3, stride=2, groups=dim, **dd),
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of this package, or one of the released SMPConv, with the model's keys.

    Raises:
        ValueError: keys are missing or left over; the message names them.
    """
    return native_keys(state_dict, model, ".smp.conv.weight_coord", _released_keys)


def _released_keys(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the released SMPConv ImageNet checkpoints, and turn their points to this package's axes.

    The release transposes its kernel and flips the rows: its point (p0, p1) lies at row -p1, column p0. Its
    `kernel_coord`, the sampling grid, is not needed.
    """
    native: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key.endswith(".kernel_coord"):
            continue
        new = renamed(key, _SMPCONV_KEYS)
        if new.endswith(".kernel.coordinate"):
            value = torch.stack((-value[..., 1], value[..., 0]), -1)  # (1, m, 2)
        elif new.endswith(".kernel.radius"):
            value = value.flatten(1)  # (1, m, 1, 1) -> (1, m)
        elif new.endswith(".kernel.weight"):
            value = value.transpose(0, 1)  # (1, C, m) -> (C, 1, m)
        native[new] = value
    return native


# the released files are on Google Drive: load one with pretrained_cfg_overlay={"file": path}
CONFIG: dict[str, Any] = {
    "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7),
    "crop_pct": 0.875, "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.0.conv", "classifier": "head.fc",
    "paper_ids": "arXiv:2304.02330", "origin_url": "https://github.com/sangnekim/SMPConv",
    "paper_name": "SMPConv: Self-moving Point Representations for Continuous Convolution",
}  # fmt: skip
default_cfgs = generate_default_cfgs({"smpconv_tiny": CONFIG, "smpconv_base": CONFIG})


def _create_smpconv(variant: str, pretrained: bool, **kwargs: Any) -> SmpConvNet:
    return build_model_with_cfg(
        SmpConvNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def smpconv_tiny(pretrained: bool = False, **kwargs: Any) -> SmpConvNet:
    """SMPConv-T: 26.7 M parameters, 82.5 % top-1 on ImageNet-1k in the paper (Table 5)."""
    arguments = {"depths": (2, 2, 8, 2), "dims": (96, 192, 384, 768), "drop_path_rate": 0.1, **kwargs}
    return _create_smpconv("smpconv_tiny", pretrained, **arguments)


@register_model
def smpconv_base(pretrained: bool = False, **kwargs: Any) -> SmpConvNet:
    """SMPConv-B: 79.5 M parameters, 83.8 % top-1 on ImageNet-1k in the paper (Table 5)."""
    arguments = {"depths": (2, 2, 20, 2), "dims": (128, 256, 512, 1024), "drop_path_rate": 0.5, **kwargs}
    return _create_smpconv("smpconv_base", pretrained, **arguments)
