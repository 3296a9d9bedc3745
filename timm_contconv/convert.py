"""The authors' checkpoints to ours: filter functions for timm's pretrained loading."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["convnext_dcls_to_native", "smpconv_to_native", "to_native"]

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
    native = dict(state_dict)
    if any(key.endswith(".dwconv.P") for key in native):
        native = convnext_dcls_to_native(native, model)
    elif any(key.endswith(".smp.conv.weight_coord") for key in native):
        native = smpconv_to_native(native)
    wanted, adapted = set(model.state_dict()), _adapted_keys(model)
    missing, unexpected = sorted(wanted - set(native) - adapted), sorted(set(native) - wanted - adapted)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: {_listed('missing', missing)};"
            f" {_listed('unexpected', unexpected)}"
        )
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
