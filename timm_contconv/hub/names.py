"""The names of timm's architectures with a recipe applied."""

from __future__ import annotations

import dataclasses
import warnings

from timm.models import is_model

from ..patching import recipe_models

__all__ = ["HAND_PATCHED", "PATCHED", "PatchedArchitecture"]

#: registered name of a model that was patched by hand
HAND_PATCHED = "contconv"


@dataclasses.dataclass(frozen=True)
class PatchedArchitecture:
    """A timm architecture with a recipe applied to it."""

    base: str
    recipe: str

    @property
    def name(self) -> str:
        """Its name in timm's registry."""
        return f"{self.base}_{self.recipe}"


def _architectures() -> dict[str, PatchedArchitecture]:
    """Everything that the recipes ask to be registered and that timm does not ship itself."""
    architectures = {}
    for recipe, models in recipe_models().items():
        for base in models:
            architecture = PatchedArchitecture(base, recipe)
            if is_model(architecture.name):
                warnings.warn(f"timm has a model {architecture.name} of its own: not registered", stacklevel=2)
            elif not is_model(base):
                warnings.warn(f"timm has no model {base}: {architecture.name} is not registered", stacklevel=2)
            else:
                architectures[architecture.name] = architecture
    return architectures


#: by name; computed before `models` registers them
PATCHED = _architectures()
