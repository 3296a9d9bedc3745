"""The convolution engine: one entry, one operator, several algorithms, and what chooses among them."""

from .aten import is_exporting, plain_only
from .autocast import has_autocast
from .choose import Call, Choice, choices
from .conv import conv
from .forced import algorithm, algorithms
from .measure import measuring
from .problem import compute_dtype
from .tune import calls_of, tune

__all__ = [
    "Call",
    "Choice",
    "algorithm",
    "algorithms",
    "calls_of",
    "choices",
    "compute_dtype",
    "conv",
    "has_autocast",
    "is_exporting",
    "measuring",
    "plain_only",
    "tune",
]
