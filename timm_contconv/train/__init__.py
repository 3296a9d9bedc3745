"""What the methods need in a training loop: parameter groups, penalties, constraints."""

from .constraints import constrain_, penalty
from .decay import warn_of_decay
from .groups import param_groups
from .hooks import training_hooks
from .offload import no_split_modules
from .smoothing import decaying_sigma

__all__ = ["constrain_", "decaying_sigma", "no_split_modules", "param_groups", "penalty", "training_hooks"]

warn_of_decay()
