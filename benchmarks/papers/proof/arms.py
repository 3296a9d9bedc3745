"""What is compared: plain networks, the same networks patched, and the papers' own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.layers import BlurPool2d
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import FlexConv2d, SmpConvBn2d

__all__ = ["ARMS", "PLAIN", "Arm", "arms_of"]

DIMS = (16, 32, 64, 96)
# layer scale starts at 1: so shallow a network learns faster with it than with 1e-6
CONVNEXT = {
    "patch_size": 1, "depths": (1, 1, 1, 1), "ls_init_value": 1.0, "conv_mlp": False, "in_chans": 1, "num_classes": 10,
}  # fmt: skip
WIDER = (18, 36, 72, 108)
RESNET_CHANNELS = (16, 32, 64, 96)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One contender.

    Attributes:
        name: as in the results.
        family: arms of one family share network, data order and initial seed.
        build: the network; random numbers are seeded by the caller.
        longer: epochs relative to the plain network's.
        frozen: names of geometry parameters that do not learn.
        after: patch the trained plain network of the same seed with this recipe, and fine-tune it; "plain" fine-tunes
            it unpatched.
        settings: of that recipe.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    longer: float = 1.0
    frozen: tuple[str, ...] = ()
    after: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def convnext(kernel_size: int = 7, dims: tuple[int, ...] = DIMS) -> nn.Module:
    """A small ConvNeXt of timm's: one 3×3 layer without stride as stem, maps of 28, 14, 7 and 3 pixels.

    Initial weights have the variance 1 / fan-in; timm's standard deviation of 0.02 is for networks of larger width.
    """
    model = timm.create_model("convnext_atto", **{**CONVNEXT, "dims": dims, "kernel_sizes": kernel_size})
    model.stem[0] = nn.Conv2d(1, dims[0], 3, padding=1)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return model


def resnet(**settings: Any) -> nn.Module:
    """A small ResNet of timm's: one 3×3 layer without stride or pool as stem, maps of 28, 14, 7 and 4 pixels."""
    width = RESNET_CHANNELS[0]
    stem = {"stem_type": "deep", "stem_width": width // 2}
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, in_chans=1, channels=RESNET_CHANNELS, **stem, **settings)
    model.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class MaxPool(nn.MaxPool2d):
    """A max-pool that timm takes as an anti-aliasing layer."""

    def __init__(self, channels: int, stride: int, **_: Any) -> None:
        super().__init__(2 * stride - 1, stride, padding=stride - 1)


def patched(build: Callable[[], nn.Module], recipe: str, **settings: Any) -> nn.Module:
    """A network that starts as the recipe's paper says."""
    return tcc.patch(build(), recipe, init="random", **settings)


def _patched(build: Callable[[], nn.Module], recipe: str, **settings: Any) -> Callable[[], nn.Module]:
    return functools.partial(patched, build, recipe, **settings)


#: recipe and settings for maps of 28 pixels and less
KERNELS: Mapping[str, Mapping[str, Any]] = {
    "dcls": {},
    "dcls_triangle": {},
    "dcls_gauss": {},
    "smp": {"kernel_size": 27},
    "flex": {"kernel_size": 29},
}


def _convnext_arms() -> list[Arm]:
    arm = functools.partial(Arm, family="convnext")
    arms = [
        arm("convnext", build=convnext),
        arm("convnext, 1.5 times as long", build=convnext, longer=1.5),
        arm("convnext, wider", build=functools.partial(convnext, dims=WIDER)),
    ]
    arms += [arm(f"convnext, dense {k}×{k}", build=functools.partial(convnext, kernel_size=k)) for k in (11, 17, 23)]
    for recipe, settings in KERNELS.items():
        arms.append(arm(f"convnext, {recipe}", build=_patched(convnext, recipe, **settings)))
    arms += [
        arm("convnext, dcls_gauss, frozen positions", build=_patched(convnext, "dcls_gauss"), frozen=("position",)),
        arm("convnext, smp, frozen radii", build=_patched(convnext, "smp", **KERNELS["smp"]), frozen=("radius",)),
        arm("convnext, then plain", build=convnext, after="plain"),
    ]
    for recipe, settings in KERNELS.items():
        arms.append(arm(f"convnext, then {recipe}", build=convnext, after=recipe, settings=settings))
    return arms


def _resnet_arms() -> list[Arm]:
    arm = functools.partial(Arm, family="resnet")
    arms = [
        arm("resnet", build=resnet),
        arm("resnet, 1.5 times as long", build=resnet, longer=1.5),
        arm("resnet, blur", build=functools.partial(resnet, aa_layer=BlurPool2d)),
        arm("resnet, max-pool", build=functools.partial(resnet, aa_layer=MaxPool)),
        arm("resnet, genv", build=_patched(resnet, "genv")),
        arm("resnet, cc", build=_patched(resnet, "cc")),
    ]
    for sigma in (0.5, 0.83, 1.2):
        fixed = _patched(resnet, "genv", initial_sigma=sigma, learn_sigma=False)
        arms.append(arm(f"resnet, genv, σ = {sigma}", build=fixed))
    arms.append(arm("resnet, then plain", build=resnet, after="plain"))
    arms += [arm(f"resnet, then {recipe}", build=resnet, after=recipe) for recipe in ("genv", "cc")]
    return arms


def with_small_kernels(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with a plain 3×3 convolution in place of every constructed one (for SMP, of both branches)."""
    model = build()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SmpConvBn2d):
            norm = nn.BatchNorm2d(layer.out_channels)
            model.set_submodule(name, nn.Sequential(_small_conv(layer, bias=False), norm))
        elif isinstance(layer, FlexConv2d):
            model.set_submodule(name, _small_conv(layer, bias=layer.bias is not None))
    return model


def _small_conv(layer: SmpConvBn2d | FlexConv2d, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=bias)


def _paper_arms() -> list[Arm]:
    create = functools.partial(timm.create_model, num_classes=10, in_chans=1)
    ccnet = functools.partial(create, dims=16, global_pool="avg")
    flexnet = functools.partial(create, "flexnet3", dim=8, img_size=28)
    smpnet = functools.partial(create, "smpnet7", dim=8, img_size=28, width_factors=(1, 1.5, 2))  # 7 take an hour
    return [
        Arm("ccnet_baseline", "ccnet", functools.partial(ccnet, "ccnet_baseline")),
        Arm("ccnet", "ccnet", functools.partial(ccnet, "ccnet")),
        Arm("flexnet3, plain 3×3", "flexnet", functools.partial(with_small_kernels, flexnet)),
        Arm("flexnet3", "flexnet", flexnet),
        Arm("flexnet3, fixed size", "flexnet", functools.partial(flexnet, flex_args={"mask": False})),
        Arm("smpnet3, plain 3×3", "smpnet", functools.partial(with_small_kernels, smpnet)),
        Arm("smpnet3", "smpnet", smpnet),
    ]


#: the network that the arms of a family are compared with
PLAIN: Mapping[str, str] = {
    "convnext": "convnext",
    "resnet": "resnet",
    "ccnet": "ccnet_baseline",
    "flexnet": "flexnet3, plain 3×3",
    "smpnet": "smpnet3, plain 3×3",
}

ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*_convnext_arms(), *_resnet_arms(), *_paper_arms())}


def arms_of(pattern: str) -> list[Arm]:
    """The arm of this name, or the arms whose names contain the text; all for "".

    Raises:
        ValueError: there is none.
    """
    found = [ARMS[pattern]] if pattern in ARMS else [arm for name, arm in ARMS.items() if pattern in name]
    if not found:
        raise ValueError(f"--arms {pattern!r}: expected a part of one of {'; '.join(ARMS)}")
    return found
