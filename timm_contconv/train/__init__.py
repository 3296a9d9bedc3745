"""What the methods ask of a training loop: parameter groups, penalties, constraints."""

from .envelopes import shrink_envelopes, sigma_per_layer
from .groups import param_groups
from .step import constrain_, penalty

__all__ = ["constrain_", "param_groups", "penalty", "shrink_envelopes", "sigma_per_layer"]
