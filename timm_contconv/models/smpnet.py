"""smpnet7: SMPConv's network for CIFAR-10 (Kim and Park 2023, Table 4), FlexNet-7 with SMP convolutions.

Beside every SMP convolution stands a small one. Each has a batch norm, and their sum a ReLU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.smp import SmpConv2d, SmpConvBn2d, SmpSpec
from .checkpoint import check_kernel_size, classifier_name, native_keys, renamed
from .full_resolution import FullResolutionNet, checked_settings, cifar10_cfg, create, full_kernel_size

__all__ = ["SmpNet", "checkpoint_filter_fn", "smpnet7"]

#: settings of the released code for CIFAR-10
CIFAR10_POINTS: dict[str, Any] = {"kernel_count": 16, "initial_radius": 0.12, "coordinate_std": 0.05}

# key of the release -> key of this network
RELEASED_KEYS = (
    (r"^module\.", ""),
    (r"^(cconv|norm)1(s?)\.", r"stem.\g<1>\2."),
    (r"\.cconv(\d?)\.Kernel\.weight_coord$", r".conv\1.conv.kernel.coordinate"),
    (r"\.cconv(\d?)\.Kernel\.weights$", r".conv\1.conv.kernel.weight"),
    (r"\.cconv(\d?)\.(Kernel\.)?(radius|train_length)$", r".conv\1.conv.kernel.\3"),
    (r"\.cconv(\d?)s\.", r".conv\1.small_conv."),
    (r"\.norm(\d?)\.", r".conv\1.bn."),
    (r"\.norm(\d?)s\.", r".conv\1.small_bn."),
    (r"\.shortcut\.0\.", ".shortcut."),
)


class SmpNet(FullResolutionNet):
    """SMPConv's network for small images (Kim and Park 2023, section 4.3).

    Args:
        in_chans, num_classes, global_pool, dim, width_factors, dropout, drop_rate, drop_path_rate: as for
            `FullResolutionNet`.
        img_size: pixels of the images, an int or (height, width). Kernels have this size, plus one if it is even.
        small_kernel: size of the small kernels, odd; None for no small convolutions.
        smp_args: settings of the SMP convolutions by name, as in `SmpSpec` without kernel_size and small_kernel, and
            "compile". Defaults: 16 points per filter, initial_radius 0.12.
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
        small_kernel: int | None = 3,
        dropout: float = 0.1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        smp_args: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        kernel_size = full_kernel_size(img_size)
        dd = {"device": device, "dtype": dtype}
        allowed = {*SmpSpec.model_fields, "compile"} - {"method", "kernel_size", "small_kernel"}
        given = checked_settings("smp_args", {} if smp_args is None else smp_args, allowed)
        settings = {"padding": "same", "bias": False, **CIFAR10_POINTS, **given, **dd}

        def conv(in_chs: int, out_chs: int, small_bias: bool = False) -> SmpConvBn2d:
            return SmpConvBn2d(SmpConv2d(in_chs, out_chs, kernel_size, **settings), small_kernel, small_bias)

        super().__init__(
            in_chans, num_classes, global_pool, functools.partial(conv, small_bias=True), conv, nn.Identity, dim,
            width_factors, dropout, drop_rate, drop_path_rate, **dd,
        )  # fmt: skip


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of an SmpNet or an SmpTCN, or a checkpoint of the authors, with the model's keys.

    The release transposes its two-dimensional kernels and flips the rows: its point (p0, p1) lies at row -p1, column
    p0. Small convolutions without a bias get one of 0 where the model has one.

    Raises:
        ValueError: keys are missing or left over, or the checkpoint's kernels have another size than the model's.
    """
    return native_keys(state_dict, model, ".Kernel.weight_coord", _of_release)


def _of_release(released: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    wanted = model.state_dict()
    native = {key: torch.zeros_like(value) for key, value in wanted.items() if key.endswith(".small_conv.bias")}
    rules = (*RELEASED_KEYS, (r"^out_layer\.", f"{classifier_name(model)}."))
    for key, value in released.items():
        new = renamed(key, rules)
        layer, _, name = new.rpartition(".")
        if name == "train_length":
            check_kernel_size(key, int(value), model.get_submodule(layer))
        else:
            native[new] = _in_our_shape(name, value, wanted[new].shape) if new in wanted else value
    return native


def _in_our_shape(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if name == "coordinate" and value.shape[-1] == 2:
        value = torch.stack((-value[..., 1], value[..., 0]), -1)
    squeezed = value.ndim != len(shape) and value.numel() == shape.numel()  # a linear layer as 1×1 convolution
    return value.reshape(shape) if squeezed else value


# the released files are on Google Drive: load one with pretrained_cfg_overlay={"file": path}
CONFIG = cifar10_cfg(
    paper_ids="arXiv:2304.02330", origin_url="https://github.com/sangnekim/SMPConv",
    paper_name="SMPConv: Self-moving Point Representations for Continuous Convolution",
)  # fmt: skip
default_cfgs = generate_default_cfgs({"smpnet7": CONFIG})


@register_model
def smpnet7(pretrained: bool = False, **kwargs: Any) -> SmpNet:
    """SMPConv's CIFAR-10 network: 489,646 parameters, 93.0 % in the paper (Table 4)."""
    arguments = {"dim": 24, "width_factors": (1, 1, 1.5, 1.5, 1.5, 2, 2), **kwargs}
    return create(SmpNet, "smpnet7", pretrained, checkpoint_filter_fn, **arguments)
