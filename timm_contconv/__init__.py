"""timm's model zoo with continuous convolutions.

    import timm, timm_contconv as tcc

    model = timm.create_model("convnext_tiny_dcls_gauss", num_classes=10)    # a named architecture
    model = tcc.patch(timm.create_model("mobilenetv3_small_100"), "dcls")    # any model, one call
    plain = tcc.merge(model)                                                 # ordinary convolutions again

Importing this package registers its architectures with timm.
"""

from .requirements import check_versions, own_requirements

check_versions(own_requirements())

from . import models
from .export import Exported, export
from .hub import from_pretrained, push_to_hub, save_pretrained
from .inspect import Inspection, inspect
from .layers.cc import cc_scales, scale_ensemble
from .layers.flex import at_resolution
from .patching import PatchReport, PatchSpec, list_patches, load_patch, merge, patch, refit_, report, unpatch
from .train import constrain_, no_split_modules, param_groups, penalty, training_hooks

__version__ = "0.1.0"

__all__ = [
    "Exported",
    "Inspection",
    "PatchReport",
    "PatchSpec",
    "at_resolution",
    "cc_scales",
    "constrain_",
    "export",
    "from_pretrained",
    "inspect",
    "list_patches",
    "load_patch",
    "merge",
    "models",
    "no_split_modules",
    "param_groups",
    "patch",
    "penalty",
    "push_to_hub",
    "refit_",
    "report",
    "save_pretrained",
    "scale_ensemble",
    "training_hooks",
    "unpatch",
]
