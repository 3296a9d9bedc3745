"""Selecting the convolutions of a model that a patch replaces."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from timm.layers import Conv2dSame
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from .tables import as_text, new_table

__all__ = [
    "Selector",
    "combined_selectors",
    "find_convolutions",
    "refusal",
    "select_convolutions",
    "shared_refusals",
    "stages",
]

Selector = str | Callable[[str, nn.Module], bool]

PLAIN_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, nn.ConvTranspose2d)


PRESETS: dict[str, Callable[[_ConvNd], bool]] = {
    "depthwise": lambda conv: conv.groups == conv.in_channels > 1 and max(conv.kernel_size) > 1,
    "strided": lambda conv: max(conv.stride) > 1 and not conv.transposed,
    "transposed": lambda conv: conv.transposed,
    "all": lambda conv: True,
}


def find_convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    """All convolutions of a model by module name, each once, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}


def select_convolutions(
    convolutions: Mapping[str, _ConvNd], selectors: Sequence[Selector], min_kernel_size: int = 1
) -> dict[str, _ConvNd]:
    """The convolutions that a selector matches, without those that a "!" selector matches.

    Args:
        convolutions: by module name.
        selectors: "depthwise" (one input channel per group, kernel larger than 1), "strided" (a stride above 1),
            "transposed" (that upscale), "all", globs over module names, and predicates (name, convolution) -> bool.
        min_kernel_size: in pixels; convolutions whose kernel is smaller along every dimension are left out.

    Raises:
        TypeError: a selector is neither a string nor callable.
        ValueError: nothing is selected; the message lists the model's convolutions.
    """
    included = [s for s in selectors if not _is_exclusion(s)]
    excluded = [s[1:] for s in selectors if isinstance(s, str) and _is_exclusion(s)]
    chosen: dict[str, _ConvNd] = {}
    for name, conv in convolutions.items():
        wanted = any(_matches(s, name, conv) for s in included) and not any(_matches(s, name, conv) for s in excluded)
        if wanted and max(conv.kernel_size) >= min_kernel_size:
            chosen[name] = conv
    if not chosen:
        limit = f" with min_kernel_size={min_kernel_size}" if min_kernel_size > 1 else ""
        raise ValueError(f"select={tuple(selectors)!r}{limit} matches no convolution. {_describe(convolutions)}")
    return chosen


def combined_selectors(
    recipe: tuple[Selector, ...], select: Selector | Sequence[Selector] | None
) -> tuple[Selector, ...]:
    """The selectors of a recipe and a caller: the caller's replace the recipe's. Exclusions alone are added to them.

    Raises:
        TypeError: select is neither a selector nor a sequence of them.
    """
    if select is None:
        return recipe
    if isinstance(select, str) or callable(select):
        listed: tuple[Selector, ...] = (select,)
    elif isinstance(select, Sequence):
        listed = tuple(select)
    else:
        raise TypeError(
            f"select={select!r}: expected 'depthwise', 'strided', 'transposed', 'all', globs of module names,"
            " predicates (name, convolution) -> bool, or a list of these"
        )
    only_exclusions = listed != () and all(map(_is_exclusion, listed))
    return (*recipe, *listed) if only_exclusions else listed


def _is_exclusion(selector: Selector) -> bool:
    return isinstance(selector, str) and selector.startswith("!")


def refusal(conv: _ConvNd, transposed: bool = False) -> str | None:
    """Why a method can't replace this convolution, whatever its settings; None if it may.

    Args:
        conv: the convolution.
        transposed: whether the method replaces transposed convolutions too.
    """
    if conv.transposed and not transposed:
        return "transposed convolution"
    if parametrize.is_parametrized(conv) or "weight" not in conv._parameters:
        return "its weight is computed from other parameters (parametrization, weight norm or pruning)"
    if isinstance(conv.weight, UninitializedParameter):
        return "its weight has no shape yet: run the model once, then patch it"
    if type(conv) not in PLAIN_TYPES:
        return f"{type(conv).__name__} computes its convolution in a way of its own"
    if isinstance(conv.padding, str) and conv.padding not in ("same", "valid"):
        return f"padding {conv.padding!r}"
    return None


def shared_refusals(model: nn.Module, convolutions: Mapping[str, _ConvNd]) -> dict[str, str]:
    """Refusals of convolutions that other parts of the model use, by name."""
    users: dict[int, list[str]] = {}
    references: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
        references |= {id(conv): f"{name}.{key}".lstrip(".") for key, conv in _references(module)}
    found: dict[str, str] = {}
    for name, conv in convolutions.items():
        if id(conv) in references:
            found[name] = f"{references[id(conv)]!r} holds it too, outside of the model's submodules"
        for key, parameter in conv._parameters.items():
            others = [user for user in users.get(id(parameter), ()) if parameter is not None and user != name]
            if others:
                found[name] = f"its {key} is shared with {others[0]!r}"
    return found


def _references(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Convolutions that a module holds outside of its submodules, each with the attribute's name."""
    for key, value in vars(module).items():
        if key == "_modules":
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        yield from ((key, item) for item in items if isinstance(item, _ConvNd))


def stages(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The stage of each named module, counted from 0.

    A stage ends with a module of timm's `feature_info`; a model without it is one stage. timm's feature extractors
    write "_" for "." in the names.
    """
    info = getattr(model, "feature_info", None) or []
    order = {name: index for index, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    named = [(item["module"], item["module"].replace(".", "_")) for item in info if item.get("module")]
    features = [name if name in order else flat for name, flat in named if name in order or flat in order]
    ends = [max(i for name, i in order.items() if f"{name}.".startswith(f"{feature}.")) for feature in features]
    return {name: sum(end < order[_known(name, order)] for end in ends) for name in names}


def _known(name: str, order: Mapping[str, int]) -> str:
    """The module's own name; for a module that a patch will add, the name of its parent."""
    while name not in order:
        name = name.rpartition(".")[0]
    return name


def _matches(selector: Selector, name: str, conv: _ConvNd) -> bool:
    if callable(selector):
        return bool(selector(name, conv))
    if not isinstance(selector, str):
        raise TypeError(f"select={selector!r}: expected a string or a predicate (name, convolution) -> bool")
    if selector in PRESETS:
        return PRESETS[selector](conv)
    return fnmatch.fnmatchcase(name, selector)


def _describe(convolutions: Mapping[str, _ConvNd], shown: int = 20) -> str:
    """The convolutions as text: counts of the presets, and a table of names."""
    if not convolutions:
        return "The model has no convolution."
    counts = ", ".join(f"{p!r} ({sum(map(rule, convolutions.values()))})" for p, rule in PRESETS.items())
    table = new_table("name", "channels", "kernel", "stride", "groups", "preset", box=None)
    for name, conv in list(convolutions.items())[:shown]:
        presets = ", ".join(preset for preset, rule in PRESETS.items() if preset != "all" and rule(conv))
        sizes = ("×".join(map(str, size)) for size in (conv.kernel_size, conv.stride))
        table.add_row(name, f"{conv.in_channels} -> {conv.out_channels}", *sizes, str(conv.groups), presets)
    lines = [line.rstrip() for line in as_text(table, width=120).splitlines() if line.strip()]
    more = [f"  ... and {len(convolutions) - shown} more"] if len(convolutions) > shown else []
    return "\n".join([f"There are: {counts}; by name or glob:", *lines, *more])
