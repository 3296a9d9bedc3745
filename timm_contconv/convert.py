"""The authors' checkpoints to ours: filter functions for timm's pretrained loading."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from timm.models._input import get_model_traits
from torch import Tensor, nn

from .layers import ConvReplacement

__all__ = ["convnext_dcls_to_native", "flexnet_to_native", "smpconv_to_native", "to_native"]

# key of the original ConvNeXt release -> key of timm's ConvNeXt
_CONVNEXT_KEYS = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.weight$", ".conv_dw.element_weight"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

# key of the SMPConv release -> key of models/smpconv.py
_SMPCONV_KEYS = (
    (r"^transitions\.0\.", "stages.1.downsample."),
    (r"^transitions\.1\.", "stages.2.downsample."),
    (r"^transitions\.2\.", "stages.3.downsample."),
    (r"\.large_kernel\.smp\.conv\.weight_coord$", ".large_kernel.conv.geometry.coordinate"),
    (r"\.large_kernel\.smp\.conv\.radius$", ".large_kernel.conv.geometry.radius"),
    (r"\.large_kernel\.smp\.conv\.weights$", ".large_kernel.conv.point_weight"),
    (r"\.large_kernel\.smp\.bn\.", ".large_kernel.bn."),
    (r"\.large_kernel\.small_conv\.conv\.", ".large_kernel.small_conv."),
    (r"\.large_kernel\.small_conv\.bn\.", ".large_kernel.small_bn."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

# key of the FlexNet release -> key of models/flexnet.py; the filters of a kernel are stacked
_FLEXNET_KEYS = (
    (r"^module\.", ""),
    (r"^cconv1\.", "stem.conv."),
    (r"^norm1\.", "stem.norm."),
    (r"^out_layer\.", "head.fc."),
    (r"\.cconv(\d)\.", r".conv\1."),
    (r"\.shortcut\.0\.", ".shortcut."),
    (r"\.Kernel\.filters\.(\d+)\.linear\.", r".sine_\1."),
    (r"\.Kernel\.filters\.(\d+)\.mu$", r".mean.\1"),
    (r"\.Kernel\.filters\.(\d+)\.gamma$", r".gamma.\1"),
    (r"\.Kernel\.linear\.(\d+)\.", r".hidden_\1."),
    (r"\.(sine|hidden)_(\d+)\.(weight|bias)$", r".\1_\3.\2"),
    (r"\.Kernel\.output_linear\.", ".output_"),
)
_FLEXNET_SETTINGS = (".temperature", ".mask_threshold")


def to_native(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of any known format into the model's own keys.

    Args:
        state_dict: what the file held; {"model": state_dict} is unwrapped.
        model: the model that will load it.

    Returns:
        A state dict with the model's keys; those of a classifier for another number of classes may differ.

    Raises:
        ValueError: keys are missing or left over; the message names them.
    """
    nested = state_dict.get("model")
    if isinstance(nested, Mapping):
        state_dict = nested
    native = {k: v.float() if v.dtype == torch.float8_e4m3fn else v for k, v in state_dict.items()}  # to be scaled
    if any(key.endswith(".dwconv.P") for key in native):
        native = convnext_dcls_to_native(native, model)
    elif any(key.endswith(".smp.conv.weight_coord") for key in native):
        native = smpconv_to_native(native)
    elif any(key.endswith(".mask_params") for key in native):
        native = flexnet_to_native(native, model)
    wanted, adapted = set(model.state_dict()), _adapted_keys(model)
    missing, unexpected = sorted(wanted - set(native) - adapted), sorted(set(native) - wanted - adapted)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: {_listed('missing', missing)};"
            f" {_listed('unexpected', unexpected)}"
        )
    return _with_input_channels(native, model)


def _with_input_channels(native: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn a replaced first convolution to the model's number of channels, where timm knows only plain weights.

    Its weights are summed for one channel, else repeated and scaled, as timm does it; widths are averaged or repeated.
    """
    names = get_model_traits(model).get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        layer = model.get_submodule(name)
        if not isinstance(layer, ConvReplacement):
            continue
        for key, parameter in layer.named_parameters():
            value = native[f"{name}.{key}"]
            axis = 0 if value.ndim == 1 else 1
            if key == "weight" or value.ndim != parameter.ndim or value.shape == parameter.shape:
                continue
            old, new = value.shape[axis], parameter.shape[axis]
            if new == 1:
                summed = value.float().sum(axis, keepdim=True)
                value = summed / old if key.startswith("geometry.") else summed
            else:
                value = value.float().index_select(axis, torch.arange(new) % old)
                value = value if key.startswith("geometry.") else value * (old / new)
            native[f"{name}.{key}"] = value
    return native


def convnext_dcls_to_native(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the released ConvNeXt-DCLS checkpoints; positions are stored once per stage.

    The release repeats a stage's positions in every block, (2, C, 1, m) with the row first, as ours.

    Raises:
        ValueError: the blocks of a stage do not agree on their positions.
    """
    native: dict[str, Tensor] = {}
    shared = {key.split(".")[1]: key for key in model.state_dict() if key.endswith("dcls_geometry.position")}
    for key, value in state_dict.items():
        renamed = key
        for pattern, replacement in _CONVNEXT_KEYS:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed.endswith(".conv_dw.P"):
            stage = renamed.split(".")[1]
            renamed = shared.get(stage, renamed.replace(".P", ".geometry.position"))
            if renamed in native and not torch.equal(native[renamed], value):
                raise ValueError(
                    f"{key}: differs from the positions of another block of stage {stage}, which shares them"
                )
        native[renamed] = value
    return native


def smpconv_to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of the released SMPConv ImageNet checkpoints; turn their points to our axes.

    The release transposes its kernel and flips it along the rows: its point (p0, p1) lies at row -p1, column p0.
    Its `kernel_coord`, the grid that the kernel is sampled on, is left out.
    """
    native: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key.endswith(".kernel_coord"):
            continue
        renamed = key
        for pattern, replacement in _SMPCONV_KEYS:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed.endswith(".geometry.coordinate"):
            value = torch.stack((-value[..., 1], value[..., 0]), -1)  # (1, m, 2)
        elif renamed.endswith(".geometry.radius"):
            value = value.flatten(1)  # (1, m, 1, 1) -> (1, m)
        elif renamed.endswith(".point_weight"):
            value = value.transpose(0, 1)  # (1, C, m) -> (C, 1, m)
        native[renamed] = value
    return native


def flexnet_to_native(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the released FlexNet checkpoints; stack the filters of each kernel.

    The release's linear layers are 1×1 convolutions; the mean and the width of a mask stand in one tensor, the rows
    first, as ours.

    Raises:
        ValueError: the checkpoint's kernels are sampled at another resolution than the model's.
    """
    native: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}  # in the order of the keys, which is that of the layers
    for key, value in state_dict.items():
        renamed = key
        for pattern, replacement in _FLEXNET_KEYS:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed.endswith(".train_length"):
            _check_kernel_size(key, int(value), model.get_submodule(renamed.removesuffix(".train_length")))
        elif renamed.endswith(".mask_params"):
            geometry = renamed.replace(".mask_params", ".geometry")
            native[f"{geometry}.mask_mean"], native[f"{geometry}.mask_sigma"] = value[:, 0], value[:, 1]
        elif match := re.fullmatch(r"(.*\.(?:mean|gamma|(?:sine|hidden)_(?:weight|bias)))\.\d+", renamed):
            stacks.setdefault(match[1], []).append(value.reshape(value.shape[:2]))
        elif not renamed.endswith(_FLEXNET_SETTINGS):
            native[renamed] = _flexnet_value(renamed, value, model)
    return {**native, **{name: torch.stack(values) for name, values in stacks.items()}}


def _flexnet_value(name: str, value: Tensor, model: nn.Module) -> Tensor:
    if name == "head.fc.weight":
        return value.flatten(1)  # (classes, C, 1, 1)
    if name.endswith((".output_weight", ".output_bias")):  # (C_out C_in, H, 1, 1) and (C_out C_in,)
        owner = model.get_submodule(name.rpartition(".")[0])
        channels: tuple[int, int] = (owner.out_channels, owner.in_channels)  # type: ignore[assignment]
        return value.reshape(*channels, *value.shape[1:2])
    return value


def _check_kernel_size(key: str, size: int, layer: nn.Module) -> None:
    """Refuse a checkpoint for another resolution: its parameters would fit, and give another function."""
    own: int = layer.kernel_size[0]  # type: ignore[index, assignment]
    if size not in (0, own):  # 0: never run
        raise ValueError(
            f"{key}={size}: the checkpoint's kernels have {size} pixels, the model's {own};"
            f" create the model with img_size={size - 1}, and turn it with tcc.at_resolution then"
        )


def _adapted_keys(model: nn.Module) -> set[str]:
    """Keys of the classifier where timm will leave it out, because the model has another number of classes."""
    config = getattr(model, "pretrained_cfg", {})
    classifier = config.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    if getattr(model, "num_classes", None) == config.get("num_classes"):
        return set()
    return {f"{name}.{key}" for name in names for key in ("weight", "bias")}


def _listed(kind: str, keys: list[str], shown: int = 8) -> str:
    if not keys:
        return f"no {kind} keys"
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return f"{len(keys)} {kind} keys: {', '.join(keys[:shown])}{more}"
