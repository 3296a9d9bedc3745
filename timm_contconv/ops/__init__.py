"""The convolution engine: one entry, one operator, several algorithms, and what chooses among them."""

from .aten import plain_only
from .choose import Choice, choices
from .conv import conv
from .forced import algorithm, algorithms
from .measure import measuring
from .problem import compute_dtype

__all__ = ["Choice", "algorithm", "algorithms", "choices", "compute_dtype", "conv", "measuring", "plain_only"]
