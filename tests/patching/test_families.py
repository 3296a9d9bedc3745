"""What a patch promises, on models of many families and of other libraries."""

import copy
import math

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import timm_contconv as tcc

from ..models_for_tests import awake, layers_of, output, relative, scatter

DEPTHWISE = ["dcls_gauss", "smp", "flex"]
STRIDED = ["genv", "cc"]
#: small models whose convolutions are built in as many ways as timm knows
TIMM = {
    "test_efficientnet": DEPTHWISE + STRIDED,
    "test_vit": STRIDED,
    "tf_mobilenetv3_small_minimal_100": DEPTHWISE + STRIDED,  # Conv2dSame
    "mixnet_s": ["smp"],  # MixedConv2d
    "xcit_nano_12_p16_224": ["dcls_gauss"],
    "edgenext_xx_small": ["smp"],
    "mobilevitv2_050": ["smp"],
    "regnetx_002": STRIDED,
    "densenet121": ["genv"],
    "hrnet_w18_small": ["genv"],
    "res2net50_14w_8s": ["genv"],
    "dla34": ["cc"],
}
SETTINGS = {
    "dcls_gauss": {"kernel_size": 11, "kernel_count": 4},
    "smp": {"kernel_count": 20},
    "flex": {"kernel_size": 11},
}


def check(model: nn.Module, recipe: str, size: tuple[int, ...] = (64, 64), init: str = "random") -> int:
    """A patch keeps the output's shape, its values are finite, gradients reach all of it, and it merges exactly.

    Returns:
        The number of convolutions that were replaced.
    """
    images = torch.randn(2, 3, *size)
    shape = output(awake(model).eval(), images).shape
    tcc.patch(model, recipe, init=init, **SETTINGS.get(recipe, {}))
    check_gradients(copy.deepcopy(model).train(), images)
    scatter(model)
    expected = output(model, images)
    assert expected.shape == shape
    assert expected.isfinite().all()
    assert relative(output(tcc.merge(model), images), expected) < 1e-4
    return len(tcc.report(model, input_size=images.shape[1:]).rows)


def check_gradients(model: nn.Module, images: torch.Tensor) -> None:
    out = model(images)
    out = out if isinstance(out, torch.Tensor) else out[-1] if isinstance(out, list) else out.logits
    out.square().mean().backward()
    for layer in layers_of(model):
        for parameter in (*layer.parameters(), *layer.geometry.values()):
            assert parameter.grad.isfinite().all()
            # a continuous kernel of one pixel is read at distance 0 alone, where its net's slope does not matter
            assert parameter.grad.any() or math.prod(layer.kernel_size) == 1


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name, recipes in TIMM.items() for recipe in recipes])
def test_models_of_timm(name, recipe):
    model = timm.create_model(name, num_classes=10)
    config = model.pretrained_cfg
    assert check(model, recipe, config["input_size"][1:] if config.get("fixed_input_size") else (64, 64))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("mobilenet_v3_small", "dcls_gauss"), ("efficientnet_b0", "genv"), ("resnet18", "genv"), ("resnet18", "genv5")],
)
def test_models_of_torchvision(name, recipe):
    assert check(torchvision.models.get_model(name, num_classes=10), recipe)


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
    ("build", "recipe"),
    [(convnext_of_transformers, "dcls_gauss"), (resnet_of_transformers, "genv"), (timm_in_transformers, "smp")],
)
def test_models_of_transformers(build, recipe):
    assert check(build(), recipe)


def test_a_feature_extractor_is_patched_like_a_model():
    model = timm.create_model("test_convnext", features_only=True)
    images = torch.randn(2, 3, 64, 64)
    shapes = [feature.shape for feature in model(images)]
    assert check(model, "dcls_gauss", init="fit")
    assert [feature.shape for feature in model(images)] == shapes
