"""Figures of a model, one file each. They need the extra `viz`.

    from timm_contconv.inspect import figures

    figures.kernels(model).save("kernels.png")

A figure is a Vega-Lite specification: it shows itself in a notebook, and saves itself as .png or .svg. A layer says
what it can show (`shown_kernels` and `shown_quantities` of `ConvReplacement`), so these work for every method.
"""

from .activation import activation
from .cost import LayerCost, cost
from .figure import Figure
from .footprints import footprints
from .frequencies import frequencies
from .geometry import geometry, movements, quantity_names
from .kernels import kernels
from .receptive_field import receptive_field

__all__ = [
    "Figure",
    "LayerCost",
    "activation",
    "cost",
    "footprints",
    "frequencies",
    "geometry",
    "kernels",
    "movements",
    "quantity_names",
    "receptive_field",
]
