"""CC: convolutions that resize by any scale (Shocher et al. 2020, "From Discrete to Continuous Convolution").

The kernel is a continuous function, a small net over sub-pixel distances. A forward pass has the paper's four steps:
the projected grid, its neighbours, the weights at their distances, and the weighted sum.

- layer.py: ContinuousConv2d.
- spec.py: CcSpec, the settings in recipes.
- grid.py: steps 1 and 2: positions, neighbours and distances, in exact integers.
- plan.py: the geometry for one size of images and outputs.
- net.py: step 3: InternalNet, the kernel as a function of distances.
- interpolation.py: the start of an internal net: linear interpolation between the pixels of a kernel.
- phases.py: step 4 at scales with few phases: ordinary convolutions.
- features_first.py: step 4 at any scale.
- merge.py: from plain convolutions, strided or transposed, and back.
- scales.py: other scales for all layers of a model: for a while, or several averaged.
"""

from .layer import ContinuousConv2d
from .net import InternalNet
from .scales import ScaleEnsemble, cc_scales, scale_ensemble
from .spec import CcSpec

__all__ = ["CcSpec", "ContinuousConv2d", "InternalNet", "ScaleEnsemble", "cc_scales", "scale_ensemble"]
