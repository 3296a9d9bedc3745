"""FlexNet: residual networks without pooling, whose convolutions learn their size (Romero et al. 2022, Fig. 10).

The names count blocks. The paper calls FlexNet-7 also FlexNet-16, which counts layers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.flex import FlexConv2d, FlexSpec
from .checkpoint import check_kernel_size, classifier_name, native_keys, renamed
from .full_resolution import FullResolutionNet, checked_settings, cifar10_cfg, create, full_kernel_size

__all__ = ["FlexNet", "checkpoint_filter_fn", "flexnet3", "flexnet5", "flexnet7"]

# key of the release -> key of this network; the filters of a kernel are stacked
RELEASED_KEYS = (
    (r"^module\.", ""),
    (r"^cconv1\.", "stem.conv."),
    (r"^norm1\.", "stem.norm."),
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


class FlexNet(FullResolutionNet):
    """FlexNet (Romero et al. 2022, appendix D.1).

    Args:
        in_chans, num_classes, global_pool, dim, width_factors, dropout, drop_rate, drop_path_rate: as for
            `FullResolutionNet`.
        img_size: pixels of the training images, an int or (height, width). Kernels have this size, plus one if it is
            even. Other image sizes work too; `tcc.at_resolution` samples the kernels at another resolution.
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
        kernel_size = full_kernel_size(img_size)
        dd = {"device": device, "dtype": dtype}
        allowed = {*FlexSpec.model_fields, "compile"} - {"method", "kernel_size"}
        flex = checked_settings("flex_args", {} if flex_args is None else flex_args, allowed)
        conv = functools.partial(FlexConv2d, kernel_size=kernel_size, **flex, **dd)
        norm = functools.partial(nn.BatchNorm2d, **dd)
        super().__init__(
            in_chans, num_classes, global_pool, conv, conv, norm, dim, width_factors, dropout, drop_rate,
            drop_path_rate, **dd,
        )  # fmt: skip


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of a FlexNet or a FlexTCN, or a checkpoint of the authors, with the model's keys.

    In the authors' files, linear layers are 1×1 convolutions, and one tensor holds the mean and the width of a mask,
    rows first as here.

    Raises:
        ValueError: keys are missing or left over, or the checkpoint's kernels have another resolution than the model's.
    """
    return native_keys(state_dict, model, ".mask_params", _of_release)


def _of_release(released: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    native: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}  # the keys have the order of the layers
    rules = (*RELEASED_KEYS, (r"^out_layer\.", f"{classifier_name(model)}."))
    for key, value in released.items():
        new = renamed(key, rules)
        layer, _, name = new.rpartition(".")
        if name == "train_length":
            check_kernel_size(key, int(value), model.get_submodule(layer))
        elif name == "mask_params":
            native[f"{layer}.kernel.mask_mean"], native[f"{layer}.kernel.mask_sigma"] = value[:, 0], value[:, 1]
        elif name.isdecimal():  # of a filter, or of the linear layer before it
            stacks.setdefault(layer, []).append(value.reshape(value.shape[:2]))
        elif not new.endswith(RELEASED_SETTINGS):
            native[new] = _in_our_shape(new, value, model)
    return {**native, **{name: torch.stack(values) for name, values in stacks.items()}}


def _in_our_shape(name: str, value: Tensor, model: nn.Module) -> Tensor:
    if name == f"{classifier_name(model)}.weight":
        return value.flatten(1)  # (classes, C, 1, 1)
    if name.endswith((".output_weight", ".output_bias")):  # (C_out C_in, H, 1, 1) and (C_out C_in,)
        kernel: Any = model.get_submodule(name.rpartition(".")[0])
        return value.reshape(kernel.out_channels, -1, *value.shape[1:2])
    return value


# the authors' repository holds the checkpoints: load one with pretrained_cfg_overlay={"file": path}
CONFIG = cifar10_cfg(
    paper_ids="arXiv:2110.08059", origin_url="https://github.com/rjbruin/flexconv",
    paper_name="FlexConv: Continuous Kernel Convolutions with Differentiable Kernel Sizes",
)  # fmt: skip
default_cfgs = generate_default_cfgs(dict.fromkeys(("flexnet3", "flexnet5", "flexnet7"), CONFIG))


@register_model
def flexnet3(pretrained: bool = False, **kwargs: Any) -> FlexNet:
    """FlexNet-3: 0.27 M parameters, 90.4 % on CIFAR-10 in the paper (Table 6)."""
    arguments = {"dim": 24, "width_factors": (1, 1.5, 2), **kwargs}
    return create(FlexNet, "flexnet3", pretrained, checkpoint_filter_fn, **arguments)


@register_model
def flexnet5(pretrained: bool = False, **kwargs: Any) -> FlexNet:
    """FlexNet-5: 0.44 M parameters, 91.0 % on CIFAR-10 in the paper (Table 6)."""
    arguments = {"dim": 22, "width_factors": (1, 1.5, 1.5, 2, 2), **kwargs}
    return create(FlexNet, "flexnet5", pretrained, checkpoint_filter_fn, **arguments)


@register_model
def flexnet7(pretrained: bool = False, **kwargs: Any) -> FlexNet:
    """FlexNet-7, or FlexNet-16 by its layers: 0.67 M parameters, 92.2 % on CIFAR-10 in the paper (Table 3)."""
    arguments = {"dim": 24, "width_factors": (1, 1, 1.5, 1.5, 1.5, 2, 2), **kwargs}
    return create(FlexNet, "flexnet7", pretrained, checkpoint_filter_fn, **arguments)
