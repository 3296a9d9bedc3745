"""CC-Net and its baseline: the classifiers of Shocher et al. 2020, "Verifying Shift-Equivariance".

Eight convolutions and three fully connected layers, all with ReLUs. The baseline halves the image in its second and
its last convolution. CC-Net resizes a little in each layer from the second on; its last map has the same size. The
paper gives neither widths nor kernel sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..hub.build import build_model_with_cfg
from ..layers import ContinuousConv2d
from .classifier import Classifier
from .full_resolution import cifar10_cfg

__all__ = ["CcNet", "CcNetHead", "CcNetLayer", "ccnet", "ccnet_baseline"]

BASELINE_STRIDES = (1, 2, 1, 1, 1, 1, 1, 2)
#: six layers resize; together they make the baseline's 1/4
CC_SCALE = 0.25 ** (1 / 6)
CC_SCALES = (None, *(CC_SCALE,) * 6, 1.0)
# the last layers whose maps have the image's size, half of it, and a quarter of it
BASELINE_FEATURES = (0, 6, 7)
CC_FEATURES = (0, 3, 7)


class CcNetLayer(nn.Module):
    """A convolution and a ReLU, (N, C_in, H, W) to (N, C_out, H', W').

    Args:
        in_chs, out_chs: channels.
        kernel_size: of the convolution, or the support of the CC layer.
        scale: of a CC layer; None for a plain convolution.
        stride: of a plain convolution.
    """

    def __init__(
        self, in_chs: int, out_chs: int, kernel_size: int, scale: float | None, stride: int = 1, **dd: Any
    ) -> None:
        super().__init__()
        self.conv: nn.Module
        if scale is None:
            self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, **dd)
        else:
            self.conv = ContinuousConv2d(in_chs, out_chs, kernel_size, scale=scale, rounding="round", **dd)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class CcNetHead(nn.Module):
    """Two fully connected layers with ReLUs, and the classifier.

    Args:
        in_features: channels of the map.
        pixels: of the map.
        hidden: units of the two layers.
        num_classes: outputs; 0 for none.
        global_pool: "flatten" gives all pixels to the first layer, as in the paper; a pooling of timm; "" for none,
            with num_classes=0 only.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        in_features: int,
        pixels: int,
        hidden: Sequence[int],
        num_classes: int,
        global_pool: str = "flatten",
        drop_rate: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.pixels, self.hidden = in_features, pixels, tuple(hidden)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool, **dd)

    def reset(self, num_classes: int, global_pool: str | None = None, **dd: Any) -> None:
        """Set the number of classes, and the pooling if given; the latter draws the first two layers again."""
        if global_pool is not None:
            self._reset_pool(global_pool, **dd)
        if num_classes and not self.global_pool:
            raise ValueError(f"global_pool='', num_classes={num_classes}: a classifier needs 'flatten' or a pooling")
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()

    def _reset_pool(self, global_pool: str, **dd: Any) -> None:
        self.global_pool = global_pool
        self.pool: nn.Module
        self.mlp: nn.Module
        if not global_pool:
            self.pool, self.mlp, self.num_features = nn.Identity(), nn.Identity(), self.in_features
            return
        if global_pool == "flatten":
            self.pool, inputs = nn.Flatten(), self.in_features * self.pixels
        else:
            pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
            self.pool, inputs = pool, self.in_features * pool.feat_mult()
        first, second = self.hidden
        self.mlp = nn.Sequential(
            nn.Linear(inputs, first, **dd), nn.ReLU(inplace=True), nn.Linear(first, second, **dd), nn.ReLU(inplace=True)
        )
        self.num_features = second

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.mlp(self.pool(x)))
        return x if pre_logits else self.fc(x)


class CcNet(Classifier):
    """Eight convolutions, plain or CC, and three fully connected layers. Features are (N, dims[-1], H/4, W/4).

    Args:
        in_chans: channels of the images.
        num_classes: outputs; 0 for none.
        global_pool: "flatten" as in the paper, for images of `img_size` only; or a pooling, for images of any size.
        scales: of the layers; None for a plain convolution.
        strides: of the plain convolutions.
        features: indices of the three layers whose maps are intermediate features.
        dims: channels of the convolutions, one int or one per layer.
        hidden: units of the first two fully connected layers.
        kernel_size: of all convolutions.
        img_size: height and width of the images, multiples of 4.
        drop_rate: dropout before the classifier.
        drop_path_rate: only 0; timm's train.py may pass it, but there is no residual path to drop.
        device, dtype: of the parameters.

    Raises:
        ValueError: img_size is no multiple of 4, drop_path_rate is not 0, or the layers' settings differ in number.
    """

    sequence = "layers"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "flatten",
        scales: Sequence[float | None] = CC_SCALES,
        strides: Sequence[int] = (1,) * len(CC_SCALES),
        features: Sequence[int] = CC_FEATURES,
        dims: int | Sequence[int] = 64,
        hidden: Sequence[int] = (256, 128),
        kernel_size: int = 3,
        img_size: int | tuple[int, int] = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        widths = [dims] * len(scales) if isinstance(dims, int) else list(dims)
        if not len(scales) == len(strides) == len(widths):
            raise ValueError(f"scales={scales}, strides={strides}, dims={dims}: expected one each per layer")
        sides = to_2tuple(img_size)
        if any(side < 4 or side % 4 for side in sides):
            raise ValueError(f"img_size={img_size}: expected multiples of 4")
        if drop_path_rate:
            raise ValueError(
                f"drop_path_rate={drop_path_rate}: expected 0; CC-Net has no residual paths to drop; use drop_rate"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.layers = nn.Sequential(
            *(
                CcNetLayer(ins, outs, kernel_size, scale, stride, **dd)
                for ins, outs, scale, stride in zip([in_chans, *widths], widths, scales, strides, strict=False)
            )
        )
        self.feature_info = [
            {"num_chs": widths[index], "reduction": 2**i, "module": f"layers.{index}"}
            for i, index in enumerate(features)
        ]
        self.num_features = widths[-1]
        self.head = CcNetHead(widths[-1], sides[0] * sides[1] // 16, hidden, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth."""
        return {"stem": r"^layers\.0", "blocks": [(r"^layers\.(\d+)", None), (r"^head\.mlp", (99999,))]}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_stem(self, x: Tensor) -> Tensor:
        return x


def _init_weights(module: nn.Module) -> None:
    """He et al. 2015, because there are no norms. The kernels of CC layers get the variance of plain ones."""
    if isinstance(module, ContinuousConv2d):
        with torch.no_grad():
            module.net.weight.mul_(6**0.5)
    elif isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)


CONFIG = cifar10_cfg(
    pool_size=(8, 8), fixed_input_size=True, interpolation="bicubic", first_conv="layers.0.conv",
    paper_ids="arXiv:2006.11120", paper_name="From Discrete to Continuous Convolution Layers",
)  # fmt: skip
default_cfgs = generate_default_cfgs({"ccnet": CONFIG, "ccnet_baseline": CONFIG})


def _create_ccnet(variant: str, pretrained: bool, **kwargs: Any) -> CcNet:
    return build_model_with_cfg(
        CcNet, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": True}, **kwargs
    )


@register_model
def ccnet(pretrained: bool = False, **kwargs: Any) -> CcNet:
    """CC-Net: a plain convolution, six CC layers with scale (1/4)^(1/6) and one with scale 1."""
    return _create_ccnet("ccnet", pretrained, **kwargs)


@register_model
def ccnet_baseline(pretrained: bool = False, **kwargs: Any) -> CcNet:
    """The paper's baseline net: plain convolutions with strides 1, 2, 1, 1, 1, 1, 1, 2."""
    plain = (None,) * len(BASELINE_STRIDES)
    arguments: dict[str, Any] = {"scales": plain, "strides": BASELINE_STRIDES, "features": BASELINE_FEATURES}
    return _create_ccnet("ccnet_baseline", pretrained, **{**arguments, **kwargs})
