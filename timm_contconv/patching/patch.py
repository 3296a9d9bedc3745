"""tcc.patch: plan, build and fit the layers, apply them to the model."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from ..layers import ConvReplacement
from ..layers.core.compilation import CompileMode, check_compile_mode
from ..layers.core.geometry import share_geometry
from ..layers.core.plain import PlainConv, require_weights
from ..layers.core.replacement import FIT_TOLERANCE, Init, check_init
from ..layers.core.shown import one_per_output
from ..progress import progress_bar
from .copies import copy_without_hooks, with_hooks
from .folding import refusing_fold
from .optimizer_hints import optimizer_hints
from .plan import PatchPlan, plan_patch, with_fit_settings
from .record import MERGED, OVERRIDDEN, RECORD, PatchRecord, Start
from .select import Selector, find_convolutions
from .spec import PatchSpec, Share
from .transaction import Transaction

__all__ = ["patch"]

Model = TypeVar("Model", bound=nn.Module)

ROUNDING = 1.01  # a fit that reaches the tolerance in float64 may exceed it a little in float32


def patch(
    model: Model,
    patch: str | Path | Mapping[str, Any] | PatchSpec,
    *,
    select: Selector | Sequence[Selector] | None = None,
    min_kernel_size: int | None = None,
    share: Share | Literal["recipe"] = "recipe",
    by_name: Mapping[str, Mapping[str, Any]] | None = None,
    init: Init = "fit",
    fit_tolerance: float | None = FIT_TOLERANCE,
    compile: CompileMode = "auto",
    progress: bool | None = None,
    **layer_overrides: Any,
) -> Model:
    """Replace convolutions of a model by layers of a method, in place.

    All or nothing: on any error the model is bit for bit what it was. Each layer keeps the device, dtype, training
    mode, frozen parameters and hooks of its convolution.

    Args:
        model: any model, of timm, torchvision, transformers or your own.
        patch: name of a recipe, path of a .toml, a dict, or a PatchSpec.
        select: the convolutions to replace: "depthwise", "strided", "transposed", "all", globs of module names
            ("stages.2.*"), predicates (name, convolution) -> bool, or a list of these; "!" excludes. A list of
            exclusions alone reduces the recipe's choice. Default: the recipe's choice.
        min_kernel_size: in pixels; leaves out convolutions whose kernel is smaller along every dimension. Default:
            the recipe's value.
        share: "stage" or None, as for `PatchSpec`; "recipe" leaves it to the recipe.
        by_name: other settings for some of the convolutions: {glob of module names: {setting: value}}, such as
            {"blocks.6.*": {"kernel_count": 9}}.
        init: "fit" starts from the replaced kernels, as closely as the method can (`tcc.report` gives the errors);
            "random" draws all parameters as the method's paper does.
        fit_tolerance: relative error ||new kernel - old kernel|| / ||old kernel|| that a fit may have. Settings that
            nobody gave, such as `kernel_count`, are chosen for it, for each group of layers that share geometry; a
            warning names the layers that exceed it. None takes such settings from the method's paper, and warns of
            nothing.
        compile: whether kernels are constructed through torch.compile: "auto" (on CUDA only), True or False.
        progress: whether a progress bar shows the fit; None shows it on a terminal only.
        **layer_overrides: new values of the layer's settings, such as `kernel_size=11`.

    Returns:
        The model.

    Raises:
        ValueError: the recipe, a setting, init or fit_tolerance is out of range; the selection is empty, or the method
            can replace none of it; the model is patched, compiled or scripted already; or init is "fit" and the
            model is on the meta device.
        TypeError: model is not a module; patch, select or progress is of a wrong type.
    """
    check_init(init)
    check_compile_mode(compile)
    if progress not in (None, True, False):
        raise TypeError(f"progress={progress!r}: expected True, False, or None for a bar on a terminal only")
    check_tolerance(fit_tolerance)
    plan = plan_patch(
        model, patch, select=select, min_kernel_size=min_kernel_size, share=share, by_name=by_name, init=init,
        fit_tolerance=fit_tolerance, **layer_overrides,
    )  # fmt: skip
    _warn_of_half_frozen(plan)
    if init == "random":
        layers = _build(plan, compile)
        _apply(model, plan, layers, _share(plan, layers), {}, None)
        return model
    require_weights(plan.convs.values())
    if fit_tolerance is not None:
        plan = with_fit_settings(plan, fit_tolerance)
    layers = _build(plan, compile)
    _fit(plan, layers, progress, fit_tolerance or 0.0)
    shared = _share(plan, layers)
    errors = {name: layers[name].fit_error(conv) for name, conv in plan.convs.items()}
    _apply(model, plan, layers, shared, errors, fit_tolerance)
    if fit_tolerance is not None:
        _warn_of_errors(plan, errors, fit_tolerance)
    return model


def check_tolerance(tolerance: float | None) -> None:
    """Raise an error unless it is a number above 0, or None."""
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise TypeError(f"fit_tolerance={tolerance!r}: expected a number above 0, or None")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"fit_tolerance={tolerance!r}: expected a finite number above 0, or None")


def _warn_of_errors(plan: PatchPlan, errors: Mapping[str, float], tolerance: float, shown: int = 3) -> None:
    """Warn once if kernels differ from the old ones by more than the tolerance, and say what helps."""
    exceeding = sorted((name for name in errors if errors[name] > ROUNDING * tolerance), key=lambda name: -errors[name])
    if not exceeding:
        return
    worst = ", ".join(f"{name} ({errors[name]:.2g})" for name in exceeding[:shown])
    warnings.warn(
        f"init='fit': the kernels of {len(exceeding)} of {len(errors)} layers differ from the old ones by more than"
        f" fit_tolerance={tolerance:g}, so the model does not keep what it has learned; the worst are {worst}."
        f" {plan.spec.layer.fit_advice}",
        UserWarning,
        stacklevel=3,
    )


def _warn_of_half_frozen(plan: PatchPlan) -> None:
    """Warn if frozen convolutions will share geometry with others that train. The first of a group decides."""
    for group in plan.groups:
        frozen = [name for name in group if not plan.convs[name].weight.requires_grad]
        if not 0 < len(frozen) < len(group):
            continue
        training = [name for name in group if name not in frozen]
        outcome = "is frozen for all of them" if group[0] in frozen else "trains, and changes the frozen kernels"
        warnings.warn(
            f"{', '.join(frozen)}: frozen, but {', '.join(training)} share(s) their geometry, which {outcome}; freeze"
            " all or none of them, or use the patch without `share`",
            UserWarning,
            stacklevel=3,
        )


# ---- build and fit: the model is not changed


def _build(plan: PatchPlan, compile: CompileMode) -> dict[str, ConvReplacement]:
    """A layer with random parameters for each convolution, by name."""
    layers = {}
    for name, conv in plan.convs.items():
        layers[name] = layer = plan.layer_of(name).build(conv)
        layer.compile_construction(compile)
    return layers


def _fit(plan: PatchPlan, layers: Mapping[str, ConvReplacement], progress: bool | None, tolerance: float) -> None:
    """Fit the layers to the convolutions, group by group, with a progress bar."""
    with progress_bar("fitting kernels", len(plan.convs), progress) as advance:
        for group in plan.groups:
            members = [layers[name] for name in group]
            type(members[0]).fit_(members, [plan.convs[name] for name in group], tolerance)
            advance(len(group))


def _share(plan: PatchPlan, layers: Mapping[str, ConvReplacement]) -> list[nn.ParameterDict]:
    """Let the layers of each shared group use one geometry, that of the first."""
    return [share_geometry([layers[name].geometry_owner for name in group]) for group in plan.shared_groups]


def _carry_over(conv: PlainConv, layer: ConvReplacement) -> None:
    """Copy training mode, frozen parameters and hooks."""
    layer.train(conv.training)
    bias_trains = conv.bias is not None and conv.bias.requires_grad
    if not conv.weight.requires_grad:
        layer.requires_grad_(False)
    if layer.bias is not None:
        layer.bias.requires_grad_(bias_trains)
    with_hooks(conv, layer)


# ---- apply


def _apply(
    model: nn.Module,
    plan: PatchPlan,
    layers: Mapping[str, ConvReplacement],
    shared: Sequence[nn.ParameterDict],
    errors: dict[str, float],
    tolerance: float | None,
) -> None:
    """Put the layers, their shared geometry and the record into the model, in one transaction."""
    for name, conv in plan.convs.items():
        _carry_over(conv, layers[name])
    changes = Transaction()
    originals = find_convolutions(model)
    for change in plan.rewired:
        if isinstance(change.after, nn.Module):
            _put_inside(change.after, f"{change.owner}.{change.attribute}.", layers)
        changes.set(model.get_submodule(change.owner), change.attribute, change.after)
    changes.replace(model, {id(originals[name]): layer for name, layer in layers.items() if name in originals})
    for geometry, (home, attribute) in zip(shared, plan.homes, strict=True):
        changes.set(layers[home] if home in layers else model.get_submodule(home), attribute, geometry)
    for name, size in plan.unfoldable.items():
        block = model.get_submodule(name)
        for method, refuse in refusing_fold(block, size).items():
            changes.set(block, method, refuse)
    changes.remove(model, MERGED)
    record = PatchRecord(
        spec=plan.spec,
        replaced={name: copy_without_hooks(conv).to("meta") for name, conv in plan.convs.items()},
        refused=plan.refused,
        homes=plan.homes,
        rewired=tuple(dataclasses.replace(change, after=None) for change in plan.rewired),  # the model holds it
        unfoldable=tuple(plan.unfoldable),
        fit_errors=errors,
        fit_tolerance=tolerance,
        starts=_starts(plan, layers) if errors else {},
        overridden={name: model.__dict__[name] for name in OVERRIDDEN if name in model.__dict__},
    )
    changes.set(model, RECORD, record)
    for name, hint in optimizer_hints(model, plan, layers).items():
        changes.set(model, name, hint)
    changes.apply()


def _starts(plan: PatchPlan, layers: Mapping[str, ConvReplacement]) -> dict[str, Start]:
    """What each layer was fitted to; layers that share their geometry share its numbers."""
    starts = {}
    for group in plan.groups:
        shown = layers[group[0]].shown_quantities()
        quantities = tuple(dataclasses.replace(q, values=q.values.cpu().clone()) for q in shown)
        for name in group:
            kernels = one_per_output(plan.convs[name].weight.detach())
            starts[name] = Start(kernels.cpu().clone(), quantities)
    return starts


def _put_inside(module: nn.Module, prefix: str, layers: Mapping[str, ConvReplacement]) -> None:
    """Replace convolutions inside a module that is not in the model yet; `prefix` is its future place."""
    for name, layer in layers.items():
        if name.startswith(prefix):
            module.set_submodule(name.removeprefix(prefix), layer)
