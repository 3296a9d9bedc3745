"""What the methods ask of a training loop: parameter groups, penalties, constraints."""

from .envelopes import shrink_envelopes, sigma_per_layer
from .groups import param_groups
from .hooks import training_hooks
from .resolution import at_resolution
from .step import constrain_, penalty

__all__ = [
    "at_resolution",
    "constrain_",
    "param_groups",
    "penalty",
    "shrink_envelopes",
    "sigma_per_layer",
    "training_hooks",
]
