"""timm's architectures with a patch: an entry point per recipe and model, and one for models patched by hand."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
)
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from ..hub.build import build_model_with_cfg
from ..hub.checks import check_arguments
from ..hub.merged import rebuild_merged
from ..hub.names import HAND_PATCHED, PATCHED, PatchedArchitecture
from ..hub.skeleton import LARGEST_ENTRIES, counted, without_memory
from ..hub.weights import packaged_cfgs
from ..patching import PatchSpec, load_patch, merge, patch
from ..patching.record import set_architecture
from .checkpoint import native_keys, renamed

__all__ = ["contconv"]

# key of the original ConvNeXt release -> key of timm's ConvNeXt
_CONVNEXT_KEYS = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.weight$", ".conv_dw.kernel.weight"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _build(
    name: str,
    base: str,
    spec: PatchSpec,
    pretrained: bool,
    base_args: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build with timm's builder, which resolves the configuration, loads weights and wraps feature extractors."""

    def patched_base(**arguments: Any) -> nn.Module:
        """The base architecture without weights, patched, and merged if `merged` describes the convolutions."""
        model = model_entrypoint(base)(pretrained=False, **{**base_args, **arguments})
        patch(model, spec, init="random")
        set_architecture(model, name)
        if merged is not None:
            merge(model, inplace=True)
            rebuild_merged(model, merged)
        return model

    kwargs.setdefault("feature_cfg", _feature_cfg(base, base_args) if kwargs.get("features_only") else {})
    model = build_model_with_cfg(patched_base, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
    if not kwargs.get("features_only"):
        _name_first_conv(model)
    return model


def _name_first_conv(model: nn.Module) -> None:
    """Set the configuration's `first_conv` to a module with a weight in the state dict, as timm expects.

    timm's trait `first_conv` still names the layer; `checkpoint.py` adapts its parameters to other input channels.
    """
    config = model.__dict__["pretrained_cfg"]
    names = config.get("first_conv") or ()
    inner = []
    for name in (names,) if isinstance(names, str) else names:
        modules = model.get_submodule(name).named_modules(prefix=name)
        inner.append(next(path for path, module in modules if "weight" in dict(module.named_parameters(recurse=False))))
    config["first_conv"] = inner[0] if isinstance(names, str) else tuple(inner)


def _feature_cfg(base: str, base_args: Mapping[str, Any]) -> dict[str, Any]:
    """timm's feature settings for the base. A FeatureGetterNet if features lie deeper than in one Sequential."""
    with without_memory(), counted(LARGEST_ENTRIES, math.inf, f"{base}: has too many modules"):
        model = model_entrypoint(base)(pretrained=False, **base_args)
    modules = [item["module"] for item in model.feature_info]
    config: dict[str, Any] = {"out_indices": tuple(range(len(modules)))}
    if all(name.count(".") == 0 for name in modules):
        return config
    if all(name.count(".") == 1 and isinstance(getattr(model, name.split(".")[0]), nn.Sequential) for name in modules):
        return {**config, "flatten_sequential": True}
    return {**config, "feature_cls": FeatureGetterNet}


def _entrypoint(name: str, architecture: PatchedArchitecture) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, patch_args: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
        if not isinstance(patch_args, Mapping | None):
            raise TypeError(
                f"patch_args={patch_args!r}: expected a dict of the layer's settings, as {{'kernel_size': 11}}"
            )
        spec = load_patch(architecture.recipe)
        if patch_args:
            spec = spec.with_layer(**patch_args)
        return _build(name, architecture.base, spec, pretrained, {}, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"""{architecture.base} with the recipe {architecture.recipe} (see `tcc.load_patch`).

    Takes the arguments of {architecture.base}, and `patch_args`: new values of the layer's settings.
    """
    return create


def contconv(
    pretrained: bool = False,
    base: str | None = None,
    base_args: Mapping[str, Any] | None = None,
    patch: Mapping[str, Any] | None = None,
    merged: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model that was patched by hand, or merged, rebuilt from its saved configuration.

    Args:
        pretrained: load the weights that the configuration names.
        base: the timm architecture that was patched.
        base_args: its arguments.
        patch: the patch, as from `PatchSpec.to_dict()`.
        merged: the plain convolutions of a merged model, by name; None for one that was not merged.

    Raises:
        ValueError: an argument is missing, unknown or out of range.
    """
    if base is None or patch is None:
        missing = "base" if base is None else "patch"
        raise ValueError(f"{missing}=None: '{HAND_PATCHED}' rebuilds a saved model; give base and patch, or tcc.patch")
    arguments = _checked_base(base, base_args or {})
    spec = PatchSpec.from_dict(patch, source=f"model_args of '{HAND_PATCHED}': patch")
    return _build(HAND_PATCHED, base, spec, pretrained, arguments, merged, **kwargs)


def _checked_base(base: str, base_args: Mapping[str, Any]) -> dict[str, Any]:
    """The base's arguments, after a check that base is a timm architecture and they describe only an architecture."""
    if not isinstance(base, str) or not is_model(base) or base == HAND_PATCHED:
        raise ValueError(f"base={base!r}: expected the name of a timm architecture")
    return check_arguments(base_args, "base_args")


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of this package, or one of the released ConvNeXt-DCLS, with the model's keys.

    Raises:
        ValueError: keys are missing or left over, or blocks of a stage have different positions.
    """
    return native_keys(state_dict, model, ".dwconv.P", _convnext_dcls_keys)


def _convnext_dcls_keys(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the released ConvNeXt-DCLS checkpoints, and keep positions once per stage.

    The release repeats a stage's positions in every block, (2, C, 1, m), rows first as here.

    Raises:
        ValueError: blocks of a stage have different positions.
    """
    native: dict[str, Tensor] = {}
    shared = {key.split(".")[1]: key for key in model.state_dict() if key.endswith("dcls_geometry.position")}
    for key, value in state_dict.items():
        new = renamed(key, _CONVNEXT_KEYS)
        if new.endswith(".conv_dw.P"):
            stage = new.split(".")[1]
            new = shared.get(stage, new.replace(".P", ".kernel.position"))
            if new in native and not torch.equal(native[new], value):
                raise ValueError(
                    f"{key}: differs from the positions of another block of stage {stage}, which shares them"
                )
        native[new] = value
    return native


def _untrained_cfg(base: str) -> PretrainedCfg:
    """The base's configuration without its weights."""
    config = get_pretrained_cfg(base)
    return dataclasses.replace(
        config or PretrainedCfg(),
        **dict.fromkeys(("url", "file", "hf_hub_id", "hf_hub_filename", "tag", "license", "origin_url")),
        **dict.fromkeys(("paper_name", "paper_ids", "notes", "description", "architecture", "label_offset")),
        custom_load=False,
        num_classes=1000,
    )


def _default_cfgs(architectures: Mapping[str, PatchedArchitecture]) -> dict[str, PretrainedCfg]:
    """Configurations by "name" and "name.tag". A tag is a folder of hub/, which says where the weights are."""
    configs = {name: _untrained_cfg(architecture.base) for name, architecture in architectures.items()}
    for (name, tag), config in packaged_cfgs().items():
        if name in architectures:
            configs[f"{name}.{tag}"] = dataclasses.replace(configs[name], **config)
    return configs


def _only_by_tag(default: DefaultCfg) -> DefaultCfg:
    """Weights for other than 1000 classes come last, so that the bare name does not load them."""
    tags = sorted(default.tags, key=lambda tag: default.cfgs[tag].num_classes != 1000)  # stable
    return dataclasses.replace(default, tags=deque(tags))


default_cfgs = {k: _only_by_tag(v) for k, v in generate_default_cfgs(_default_cfgs(PATCHED)).items()}
for _name, _architecture in PATCHED.items():
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name, _architecture)))
register_model(contconv)
