"""The names of timm's architectures with a recipe applied."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from timm.models import is_model

from ..patching import recipe_models

__all__ = ["HAND_PATCHED", "PATCHED", "PatchedArchitecture"]

#: registered name of a model that was patched by hand
HAND_PATCHED = "contconv"


class PatchedArchitecture(NamedTuple):
    """A timm architecture with a recipe applied to it."""

    base: str
    recipe: str


def _architectures() -> dict[str, PatchedArchitecture]:
    """Everything that the recipes ask to be registered and that timm does not ship itself."""
    architectures = {}
    for recipe, models in recipe_models().items():
        for base in models:
            name = f"{base}_{recipe}"
            if is_model(name):
                warnings.warn(f"timm has a model {name} of its own: not registered", stacklevel=2)
            elif not is_model(base):
                warnings.warn(f"timm has no model {base}: {name} is not registered", stacklevel=2)
            else:
                architectures[name] = PatchedArchitecture(base, recipe)
    return architectures


#: by name; computed before `models` registers them
PATCHED = _architectures()
