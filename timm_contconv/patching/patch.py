"""Replacing convolutions of a model by those of a method."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..layers import ConstructedConv, ConvReplacement
from ..layers.compilation import CompileMode, check_compile_mode
from ..layers.replacement import Init, PlainConv, check_init, share_geometry
from .fit import fit_errors, warm_start
from .record import PatchRecord, get_record, set_record
from .reparameterize import folding_obstacles
from .rewire import Rewired, move_stem_pool, revert
from .select import Selector, obstacle, select_convolutions, stages, ties
from .spec import PatchSpec, as_patch_spec
from .swap import (
    copy_without_hooks,
    exempt_from_weight_decay,
    geometry_homes,
    remove_traces,
    swap,
    with_hooks,
)

__all__ = ["patch"]

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    patch: str | Path | Mapping[str, Any] | PatchSpec,
    *,
    select: Selector | Sequence[Selector] | None = None,
    min_kernel_size: int | None = None,
    init: Init = "fit",
    compile: CompileMode = "auto",
    progress: bool | None = None,
    **layer_overrides: Any,
) -> Model:
    """Replace convolutions of a model, in place, by those of a method.

    All or nothing: on any error the model is bit for bit what it was. Device, dtype, training mode, frozen
    parameters and hooks of each convolution carry over to its replacement.

    Args:
        model: timm's, torchvision's, transformers', your own.
        patch: a recipe's name, the path of a .toml, a dict, or a PatchSpec.
        select: which convolutions, instead of the recipe's own choice: "depthwise", "strided", "all", globs of
            module names ("stages.2.*"), predicates (name, convolution) -> bool, or a list of these; "!" excludes.
            Only exclusions: the recipe's choice less these.
        min_kernel_size: leave out convolutions whose kernel is smaller along every dimension, in pixels. Default:
            as the recipe says, which is all.
        init: "fit" starts from the kernels that are replaced: exactly, where the method can, else as near as it
            gets (`tcc.report` tells how near). "random" draws all parameters as the method's paper does.
        compile: "auto" compiles kernel construction on CUDA only; True, False.
        progress: whether a progress bar shows the fit; None shows it on a terminal.
        **layer_overrides: other values for settings of the recipe's layer, as `kernel_size=11`.

    Returns:
        The model.

    Raises:
        ValueError: unknown recipe or setting, a value out of range, a selection that matches nothing or nothing
            that the method can replace, a model that is patched already, compiled or scripted, an unknown init, or
            "fit" for a model on the meta device.
        TypeError: model is not a module; patch or a selector is of a wrong type.
    """
    check_init(init)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a module, as timm.create_model returns one")
    check_compile_mode(compile)
    spec = as_patch_spec(patch)
    if layer_overrides:
        spec = spec.with_layer(**layer_overrides)
    if min_kernel_size is not None:
        spec = PatchSpec.from_dict({**spec.to_dict(), "min_kernel_size": min_kernel_size})
    _require_patchable(model)
    rewired = move_stem_pool(model) if spec.stem_pool == "to_stage" else ()
    try:
        _replace(model, spec, _selectors(spec, select), init, compile, rewired, progress)
    except BaseException:
        revert(model, rewired)
        raise
    return model


def _replace(
    model: nn.Module,
    spec: PatchSpec,
    selectors: Sequence[Selector],
    init: Init,
    compile: CompileMode,
    rewired: tuple[Rewired, ...],
    progress: bool | None,
) -> None:
    """Replace what the selectors choose and record it; on any error the model's modules are what they were."""
    selected = select_convolutions(model, selectors, spec.min_kernel_size)
    stage_of = dict(zip(selected, stages(model, list(selected)), strict=True))
    chosen, left_alone = _replaceable(spec, selected, stage_of, ties(model, selected))
    resolved, replacements = _build(spec, chosen, stage_of)
    folding = folding_obstacles(model, replacements, spec.foldable, spec.unfoldable)
    obstacles = {name: reason for name, reason in folding.items() if reason is not None}
    if obstacles:
        left_alone |= obstacles
        chosen = _without(chosen, left_alone, spec)
        resolved, replacements = _build(spec, chosen, stage_of)
    spec, groups = resolved, _groups(resolved, chosen, stage_of)
    _warn_of_half_frozen(groups, chosen)
    if init == "fit":
        warm_start(groups, chosen, replacements, progress)
    for name, conv in chosen.items():
        _carry_over(conv, replacements[name])
        if isinstance(layer := replacements[name], ConstructedConv):
            layer.compile_mode = compile
    trials = {"foldable": tuple(name for name in folding if name not in obstacles), "unfoldable": tuple(obstacles)}
    record = PatchRecord(
        spec=spec.model_copy(update={"select": _recordable(selectors, chosen), "models": (), **trials}),
        replaced={name: copy_without_hooks(conv).to("meta") for name, conv in chosen.items()},
        left_alone=left_alone,
        homes=geometry_homes(model, [group for group in groups if len(group) > 1], spec.layer.method),
        rewired=rewired,
    )
    undo = swap(model, replacements)
    try:
        shared = [[replacements[name] for name in group] for group in groups if len(group) > 1]
        for layers, (home, attribute) in zip(shared, record.homes, strict=True):
            share_geometry(layers, model.get_submodule(home), attribute)
        errors = fit_errors(chosen, replacements) if init == "fit" else {}
        set_record(model, dataclasses.replace(record, fit_errors=errors))
        exempt_from_weight_decay(model)
    except BaseException:
        remove_traces(model, record)
        undo()
        raise


def _require_patchable(model: nn.Module) -> None:
    if "_orig_mod" in model._modules:
        raise ValueError(f"model: a compiled {type(model._orig_mod).__name__}: patch the model, then compile it")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: a ScriptModule runs TorchScript, not the modules in it; patch the model that it was made from,"
            " then script that"
        )
    record = get_record(model)
    if record is not None:
        raise ValueError(
            f"model: already patched with {record.spec.layer.method!r}; tcc.unpatch(model) or tcc.merge(model) first"
        )
    for name, module in model.named_modules():
        if isinstance(module, ConvReplacement):
            raise ValueError(f"model: {name or 'it'} is already a {type(module).__name__}; tcc.merge(model) first")
    if isinstance(model, _ConvNd):
        raise ValueError(
            "model: a lone convolution can't be replaced in place; put it into a module, or call"
            " Layer.from_conv(convolution, spec)"
        )


def _selectors(spec: PatchSpec, select: Selector | Sequence[Selector] | None) -> tuple[Selector, ...]:
    if select is None:
        return spec.select
    listed = (select,) if isinstance(select, str) or callable(select) else tuple(select)
    only_exclusions = listed != () and all(isinstance(s, str) and s.startswith("!") for s in listed)
    return (*spec.select, *listed) if only_exclusions else listed


def _recordable(selectors: Sequence[Selector], chosen: Iterable[str]) -> tuple[str, ...]:
    """Selectors as they can be written to a file: predicates become the names that they chose."""
    texts = [s for s in selectors if isinstance(s, str)]
    return tuple(texts) if len(texts) == len(selectors) else tuple(chosen)


def _replaceable(
    spec: PatchSpec, selected: Mapping[str, _ConvNd], stage_of: Mapping[str, int], tied: Mapping[str, str]
) -> tuple[dict[str, PlainConv], dict[str, str]]:
    chosen: dict[str, PlainConv] = {}
    left_alone: dict[str, str] = {}
    for name, conv in selected.items():
        plain = cast(PlainConv, conv)  # `obstacle` names what is not
        reason = obstacle(conv) or tied.get(name) or spec.layer_at(stage_of[name]).refusal(plain)
        if reason is None:
            chosen[name] = plain
        else:
            left_alone[name] = reason
    return _without(chosen, left_alone, spec), left_alone


def _without(chosen: Mapping[str, PlainConv], left_alone: Mapping[str, str], spec: PatchSpec) -> dict[str, PlainConv]:
    remaining = {name: conv for name, conv in chosen.items() if name not in left_alone}
    if not remaining:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in left_alone.items())
        raise ValueError(f"{spec.layer.method} can replace none of the selected convolutions:\n{reasons}")
    return remaining


def _build(
    spec: PatchSpec, chosen: Mapping[str, PlainConv], stage_of: Mapping[str, int]
) -> tuple[PatchSpec, dict[str, ConvReplacement]]:
    """The spec with everything filled in for these convolutions, and a layer for each."""
    groups = _groups(spec, chosen, stage_of)
    layer_spec = spec.layer.resolve([[chosen[name] for name in group] for group in groups])
    spec = spec.model_copy(update={"layer": layer_spec})
    return spec, {name: spec.layer_at(stage_of[name]).build(conv, "random") for name, conv in chosen.items()}


def _groups(spec: PatchSpec, chosen: Mapping[str, PlainConv], stage_of: Mapping[str, int]) -> list[list[str]]:
    """Names of convolutions that will share their geometry, group by group."""
    if spec.share is None:
        return [[name] for name in chosen]
    groups: dict[Any, list[str]] = {}
    for name, conv in chosen.items():
        key = (stage_of[name], conv.weight.shape[:2], len(conv.kernel_size), conv.weight.device, conv.weight.dtype)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _warn_of_half_frozen(groups: Sequence[Sequence[str]], chosen: Mapping[str, PlainConv]) -> None:
    """Say where frozen convolutions will share geometry, that of the first of a group, with others that train."""
    for group in groups:
        frozen = [name for name in group if not chosen[name].weight.requires_grad]
        if not 0 < len(frozen) < len(group):
            continue
        training = [name for name in group if name not in frozen]
        outcome = "is frozen for all of them" if group[0] in frozen else "trains, and changes the frozen kernels"
        warnings.warn(
            f"{', '.join(frozen)}: frozen, but {', '.join(training)} share(s) their geometry, which {outcome}; freeze"
            " them all or none, or use the patch without `share`",
            UserWarning,
            stacklevel=4,
        )


def _carry_over(conv: PlainConv, layer: nn.Module) -> None:
    """Training mode, frozen parameters and hooks."""
    layer.train(conv.training)
    if not conv.weight.requires_grad:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == "bias" and conv.bias is not None and conv.bias.requires_grad)
    elif conv.bias is not None and not conv.bias.requires_grad and isinstance(layer.bias, Tensor):
        layer.bias.requires_grad_(False)
    with_hooks(conv, layer)
