"""PatchPlan: what a patch will do to a model."""

from __future__ import annotations

import dataclasses
import glob
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers import ConvReplacement, LayerSpec
from ..layers.core.arguments import check_module
from ..layers.core.plain import PlainConv
from ..layers.core.replacement import FIT_TOLERANCE, Init
from ..layers.core.spec import KernelSpec
from .folding import folds_of_one_size
from .record import get_record
from .select import (
    Selector,
    combined_selectors,
    find_convolutions,
    refusal,
    select_convolutions,
    shared_refusals,
    stages,
)
from .spec import PatchSpec, Share, as_patch_spec
from .stem_pool import Rewired, plan_stem_pool, with_changes
from .tables import as_text, new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PatchPlan", "plan_patch", "with_fit_settings"]


@dataclasses.dataclass(frozen=True)
class PatchPlan:
    """What a patch will do. Prints as a table.

    Attributes:
        spec: the patch, completed with all settings that depend on the model.
        convs: the convolutions to replace, by module name, with their strides after the patch.
        stage_of: the stage of each, counted from 0.
        groups: all their names, grouped by the geometry that their layers will share.
        homes: where the geometry of each shared group is registered: (module name, attribute).
        refused: selected convolutions that are not replaced, and why.
        rewired: other changes of the model.
        unfoldable: blocks that will refuse to fold themselves, by module name, with the only kernel size that they
            fold.
    """

    spec: PatchSpec
    convs: dict[str, PlainConv]
    stage_of: dict[str, int]
    groups: tuple[tuple[str, ...], ...]
    homes: tuple[tuple[str, str], ...]
    refused: dict[str, str]
    rewired: tuple[Rewired, ...]
    unfoldable: dict[str, str]

    @property
    def shared_groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups of more than one convolution."""
        return tuple(group for group in self.groups if len(group) > 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "patch": self.spec.to_dict(),
            "replaced": {name: self._settings(name) for name in self.convs},
            "groups": [list(group) for group in self.shared_groups],
            "refused": dict(self.refused),
            "rewired": [change.name for change in self.rewired],
        }

    def _settings(self, name: str) -> dict[str, Any]:
        return self.layer_of(name).model_dump(mode="json", exclude_none=True)

    def layer_of(self, name: str) -> LayerSpec:
        """The settings of a convolution's new layer."""
        return self.spec.layer_at(self.stage_of[name], name)

    def __rich__(self) -> Table:
        table = new_table(
            "name", "now", "becomes", "geometry", title=f"{self.spec.layer.method}: {len(self.convs)} layers"
        )
        home_of = {
            name: ".".join(home) for group, home in zip(self.shared_groups, self.homes, strict=True) for name in group
        }
        for name, conv in self.convs.items():
            settings = ", ".join(f"{key}={value}" for key, value in self._settings(name).items() if key != "method")
            size = "×".join(map(str, conv.kernel_size))
            table.add_row(name, f"{type(conv).__name__} {size}", settings, home_of.get(name, "its own"))
        for change in self.rewired:
            values = [type(v).__name__ if isinstance(v, nn.Module) else str(v) for v in (change.before, change.after)]
            table.add_row(change.name, *values, "")
        for name, reason in self.refused.items():
            table.add_row(name, "refused", reason, "")
        return table

    def __str__(self) -> str:
        return as_text(self)


def plan_patch(
    model: nn.Module,
    patch: str | Path | Mapping[str, Any] | PatchSpec,
    *,
    select: Selector | Sequence[Selector] | None = None,
    min_kernel_size: int | None = None,
    share: Share | Literal["recipe"] = "recipe",
    by_name: Mapping[str, Mapping[str, Any]] | None = None,
    init: Init = "fit",
    fit_tolerance: float | None = FIT_TOLERANCE,
    **layer_overrides: Any,
) -> PatchPlan:
    """What `tcc.patch` will do with these arguments. The model is not changed, and may be on the meta device.

    Settings that depend on the old kernels' values, such as the number of elements that a fit needs, stay open.

    Raises:
        TypeError, ValueError: as `tcc.patch`.
    """
    check_module(model)
    spec = as_patch_spec(patch)
    if layer_overrides:
        spec = spec.with_layer(**layer_overrides)
    changes: dict[str, Any] = {} if min_kernel_size is None else {"min_kernel_size": min_kernel_size}
    if share != "recipe":
        changes["share"] = share
    if by_name is not None:
        changes["by_name"] = {**spec.by_name, **by_name}
    if changes:
        spec = PatchSpec.from_dict({**spec.to_dict(), **changes})
    _require_patchable(model)
    return _plan(model, spec, combined_selectors(spec.select, select), init == "random" or fit_tolerance is None)


def _plan(model: nn.Module, spec: PatchSpec, selectors: Sequence[Selector], as_in_papers: bool) -> PatchPlan:
    rewired = plan_stem_pool(model) if spec.stem_pool == "to_stage" else ()
    convolutions = with_changes(find_convolutions(model), rewired)
    selected = select_convolutions(convolutions, selectors, spec.min_kernel_size)
    stage_of = stages(model, selected)
    layers = {name: spec.layer_at(stage, name) for name, stage in stage_of.items()}
    convs, refused = _split(model, spec.layer.method, selected, layers)
    groups = _groups(spec.share, convs, stage_of, layers)
    layer = spec.layer.resolve([[convs[name] for name in group] for group in groups]) if as_in_papers else spec.layer
    homes = _homes(model, [group for group in groups if len(group) > 1], layer.method)
    resolved = {"layer": layer, "select": _recordable(selectors, convs), "models": ()}
    return PatchPlan(
        spec=spec.model_copy(update=resolved),
        convs=convs,
        stage_of={name: stage_of[name] for name in convs},
        groups=groups,
        homes=homes,
        refused=refused,
        rewired=rewired,
        unfoldable=folds_of_one_size(model, _kernel_sizes(convs, layers)),
    )


def with_fit_settings(plan: PatchPlan, tolerance: float) -> PatchPlan:
    """The plan with the settings filled in that a fit of the convolutions' kernels needs, group by group."""
    chosen: dict[str, dict[str, Any]] = {}
    for group in plan.groups:
        before = plan.layer_of(group[0])
        after = before.for_fit([plan.convs[name] for name in group], tolerance)
        changed = {key: value for key, value in after if value != getattr(before, key)}
        chosen |= dict.fromkeys(group, changed)
    common = _most_common(chosen.values())
    spec = plan.spec.model_copy(update={"layer": plan.spec.layer.model_copy(update=common)})
    by_name = dict(spec.by_name)
    for name, settings in chosen.items():
        now = spec.layer_at(plan.stage_of[name], name)
        if rest := {key: value for key, value in settings.items() if getattr(now, key) != value}:
            by_name[glob.escape(name)] = {**by_name.get(glob.escape(name), {}), **rest}
    return dataclasses.replace(plan, spec=spec.model_copy(update={"by_name": by_name}))


def _most_common(settings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The most common value of each setting."""
    counts: dict[str, Counter[Any]] = {}
    for values in settings:
        for key, value in values.items():
            counts.setdefault(key, Counter())[value] += 1
    return {key: values.most_common(1)[0][0] for key, values in counts.items()}


def _kernel_sizes(convs: Mapping[str, PlainConv], layers: Mapping[str, LayerSpec]) -> dict[str, tuple[int, ...]]:
    """Sizes of the dense kernels, by name; empty for a method that constructs no kernel."""
    return {
        name: layer.sizes(len(conv.kernel_size))
        for name, conv in convs.items()
        if isinstance(layer := layers[name], KernelSpec)
    }


def _split(
    model: nn.Module, method: str, selected: Mapping[str, _ConvNd], layers: Mapping[str, LayerSpec]
) -> tuple[dict[str, PlainConv], dict[str, str]]:
    """The convolutions that can be replaced, and the refusals of the others."""
    in_use = shared_refusals(model, selected)
    convs: dict[str, PlainConv] = {}
    refused: dict[str, str] = {}
    for name, conv in selected.items():
        plain = cast(PlainConv, conv)  # else `refusal` gives a reason
        layer = layers[name]
        reason = refusal(conv, layer.replaces_transposed) or in_use.get(name) or layer.refusal(plain)
        if reason is None:
            convs[name] = plain
        else:
            refused[name] = reason
    if not convs:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"{method} can replace none of the selected convolutions:\n{reasons}")
    return convs, refused


def _require_patchable(model: nn.Module) -> None:
    if "_orig_mod" in model._modules or model._compiled_call_impl is not None:
        inner = model._modules.get("_orig_mod", model)
        raise ValueError(f"model: a compiled {type(inner).__name__}: patch the model, then compile it")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: a ScriptModule runs TorchScript, not the modules in it; patch the original model, then script it"
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


def _recordable(selectors: Sequence[Selector], chosen: Iterable[str]) -> tuple[str, ...]:
    """Selectors that can be written to a file: the names that were chosen if there are predicates."""
    texts = [s for s in selectors if isinstance(s, str)]
    return tuple(texts) if len(texts) == len(selectors) else tuple(chosen)


def _groups(
    share: Share, convs: Mapping[str, PlainConv], stage_of: Mapping[str, int], layers: Mapping[str, LayerSpec]
) -> tuple[tuple[str, ...], ...]:
    """Names of convolutions that will share their geometry, group by group."""
    if share is None:
        return tuple((name,) for name in convs)
    groups: dict[Any, tuple[str, ...]] = {}
    for name, conv in convs.items():
        key = (stage_of[name], conv.weight.shape, conv.weight.device, conv.weight.dtype, layers[name])
        groups[key] = (*groups.get(key, ()), name)
    return tuple(groups.values())


def _homes(model: nn.Module, groups: Sequence[Sequence[str]], method: str) -> tuple[tuple[str, str], ...]:
    """Where each group's shared geometry is registered: (module name, attribute)."""
    homes: list[tuple[str, str]] = []
    for group in groups:
        home = _home(model, group)
        taken = sum(other == home for other, _ in homes)
        homes.append((home, f"{method}_geometry_{taken + 1}" if taken else f"{method}_geometry"))
    return tuple(homes)


def _home(model: nn.Module, group: Sequence[str]) -> str:
    """The innermost module that holds the whole group, so that FSDP gathers the geometry for all of it.

    A container is left out, because it would run the geometry as a layer. The model itself is left out, because
    feature extractors take only parts of it; the group's first layer holds the geometry then.
    """
    common: list[str] = []
    for step in zip(*(name.split(".") for name in group), strict=False):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    while common and isinstance(model.get_submodule(".".join(common)), nn.Sequential | nn.ModuleList | nn.ModuleDict):
        common.pop()
    return ".".join(common) if common else group[0]
