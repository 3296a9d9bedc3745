"""What the methods need in a training loop: parameter groups, penalties, constraints."""

from .constraints import constrain_, penalty
from .groups import param_groups
from .hooks import training_hooks
from .smoothing import decaying_sigma

__all__ = ["constrain_", "decaying_sigma", "param_groups", "penalty", "training_hooks"]
