"""Replacing the convolutions of a model."""

from .patch import patch
from .plan import PatchPlan, plan_patch
from .refit import can_refit, refit_
from .report import report
from .report_table import PatchReport
from .restore import merge, unpatch
from .spec import PatchSpec, list_patches, load_patch, recipe_models

__all__ = [
    "PatchPlan",
    "PatchReport",
    "PatchSpec",
    "can_refit",
    "list_patches",
    "load_patch",
    "merge",
    "patch",
    "plan_patch",
    "recipe_models",
    "refit_",
    "report",
    "unpatch",
]
