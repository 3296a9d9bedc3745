"""What a model's kernels learned, in pictures.

- `inspection`: `tcc.inspect` and what it returns; `findings`: its facts; `page`, `gallery`: them as one HTML file, from
  `assets/`
- `figures/`: every figure as a function of a model
- `shown`: what pictures show of each layer; the layers say it themselves
- `timing`, `receptive_field`, `activation`, `images`: what is measured for a report, and with which images
- `packing`: kernels as compact arrays; `writing`: files that are written whole or not at all

`timm_contconv.inspect` names both this package and the verb: `tcc.inspect(model)` works, and so do
`tcc.inspect.figures` and `from timm_contconv.inspect import figures`.
"""

from .findings import LayerRow
from .inspection import Inspect, Inspection

__all__ = ["Inspection", "LayerRow", "inspect"]

inspect = Inspect()
