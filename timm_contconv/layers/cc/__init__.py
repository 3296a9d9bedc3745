"""CC: convolutions that resize by any scale (Shocher et al. 2020, "From Discrete to Continuous Convolution").

The kernel is a continuous function, a small net over sub-pixel distances. A forward pass takes the paper's four
steps: the projected grid and its neighbours, the weights at their distances, and applying them.

    layer.py            ContinuousConv2d
    spec.py             CcSpec, the settings in recipes
    grid.py             steps 1 and 2: positions, neighbours and distances, in exact integers
    plan.py             what follows from the sizes of an image and its output
    net.py              step 3: InternalNet, the kernel as a function of distances
    interpolation.py    how an internal net starts: as linear interpolation between the pixels of a kernel
    phases.py           step 4 at scales with few phases: ordinary convolutions
    features_first.py   step 4 at any scale
    merge.py            from plain convolutions, and back
    scales.py           other scales for a whole model's layers: for a while, or several averaged
"""

from .layer import ContinuousConv2d
from .net import InternalNet
from .scales import ScaleEnsemble, cc_scales, scale_ensemble
from .spec import CcSpec

__all__ = ["CcSpec", "ContinuousConv2d", "InternalNet", "ScaleEnsemble", "cc_scales", "scale_ensemble"]
