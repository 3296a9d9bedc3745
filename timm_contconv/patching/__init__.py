"""Replacing the convolutions of a model."""

from .patch import patch
from .report import PatchReport, report
from .restore import merge, unpatch
from .spec import PatchSpec, list_patches, load_patch

__all__ = ["PatchReport", "PatchSpec", "list_patches", "load_patch", "merge", "patch", "report", "unpatch"]
