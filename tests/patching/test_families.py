"""What a patch promises, on models of many families and of other libraries."""

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from ..helpers import slow_but
from ..promises import check

DEPTHWISE = ["dcls_gauss", "smp", "flex"]
STRIDED = ["genv", "cc"]
#: small models whose convolutions are built in as many ways as timm knows
TIMM = {
    "test_efficientnet": DEPTHWISE + STRIDED,
    "test_vit": STRIDED,
    "tf_mobilenetv3_small_minimal_100": DEPTHWISE + STRIDED,  # Conv2dSame
    "mixnet_s": ["smp"],  # MixedConv2d
    "xcit_nano_12_p16_224": ["dcls_gauss"],
    "regnetx_002": STRIDED,
    "dla34": ["cc"],
}
SETTINGS = {
    "dcls_gauss": {"kernel_size": 11, "kernel_count": 4},
    "smp": {"kernel_count": 20},
    "flex": {"kernel_size": 11},
}


def replaced(model: nn.Module, recipe: str, size: tuple[int, ...] = (64, 64), init: str = "random") -> int:
    """How many convolutions were, once the promises are verified."""
    return check(model, recipe, torch.randn(2, 3, *size), init=init, **SETTINGS.get(recipe, {})).replaced


TORCHVISION = [
    ("mobilenet_v3_small", "dcls_gauss"), ("efficientnet_b0", "genv"), ("resnet18", "genv"), ("resnet18", "genv5"),
]  # fmt: skip
CASES = [(name, recipe) for name, recipes in TIMM.items() for recipe in recipes]


@pytest.mark.parametrize(("name", "recipe"), slow_but(CASES, *CASES[:10]))  # the others are in `make zoo`, too
def test_models_of_timm(name, recipe):
    model = timm.create_model(name, num_classes=10)
    config = model.pretrained_cfg
    assert replaced(model, recipe, config["input_size"][1:] if config.get("fixed_input_size") else (64, 64))


@pytest.mark.parametrize(
    ("name", "recipe"),
    slow_but(TORCHVISION, TORCHVISION[0], TORCHVISION[2]),
)
def test_models_of_torchvision(name, recipe):
    assert replaced(torchvision.models.get_model(name, num_classes=10), recipe)


def convnext_of_transformers() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=10)
    return transformers.ConvNextForImageClassification(config)


def resnet_of_transformers() -> nn.Module:
    config = transformers.ResNetConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], embedding_size=8)
    return transformers.ResNetForImageClassification(config)


def timm_in_transformers() -> nn.Module:
    config = transformers.TimmWrapperConfig(architecture="test_convnext", num_labels=10)
    return transformers.TimmWrapperForImageClassification(config)


@pytest.mark.parametrize(
    ("build", "recipe", "expected"),
    [
        (convnext_of_transformers, "dcls_gauss", 5),
        (resnet_of_transformers, "genv", 7),
        (timm_in_transformers, "smp", 9),
    ],
)
def test_models_of_transformers(build, recipe, expected):
    assert replaced(build(), recipe) == expected


def test_a_feature_extractor_is_patched_like_a_model():
    model = timm.create_model("test_convnext", features_only=True)
    images = torch.randn(2, 3, 64, 64)
    shapes = [feature.shape for feature in model(images)]
    assert replaced(model, "dcls_gauss", init="fit") == 9
    assert [feature.shape for feature in model(images)] == shapes
