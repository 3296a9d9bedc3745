"""What the methods ask of a training loop: parameter groups, penalties, constraints."""

from .groups import param_groups
from .hooks import training_hooks
from .resolution import at_resolution
from .step import constrain_, penalty

__all__ = [
    "at_resolution",
    "constrain_",
    "param_groups",
    "penalty",
    "training_hooks",
]
