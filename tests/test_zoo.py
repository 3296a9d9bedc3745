"""Patching models of many families and of other libraries: what a patch promises holds for all."""

import pytest
import timm
import torch
import torchvision
import transformers
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations

import timm_contconv as tcc
from tests.promises import check, output, sample

RECIPES = {"depthwise": ("dcls_gauss", "smp", "flex"), "strided": ("genv", "cc")}
#: small models whose convolutions are built in as many ways as timm knows
TIMM = {
    "depthwise": [
        "test_convnext",
        "test_efficientnet",
        "tf_mobilenetv3_small_minimal_100",  # Conv2dSame
        "mobileone_s1",
        "repvit_m0_9",
        "repghostnet_050",
        "efficientvit_b0",
        "xcit_nano_12_p16_224",
        "mixnet_s",  # MixedConv2d
        "lcnet_050",
        "edgenext_xx_small",
        "mobilevitv2_050",
    ],
    "strided": [
        "test_resnet",
        "test_efficientnet",
        "test_vit",
        "tf_mobilenetv3_small_minimal_100",
        "nf_resnet26",  # standardised weights
        "regnetx_002",
        "densenet121",
        "hrnet_w18_small",
        "levit_128s",
        "res2net50_14w_8s",
        "dla34",
        "hgnetv2_b0",
    ],
}
#: each model with one recipe of its kind, in turns: `make zoo` patches every family with all of them
CASES = [
    (name, RECIPES[preset][number % len(RECIPES[preset])])
    for preset, names in TIMM.items()
    for number, name in enumerate(names)
]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_models_of_timm(name, recipe):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    outcome = check(model, recipe, sample(model), init="random")
    assert outcome.replaced or outcome.refused


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, recipe) for name, preset in (("test_convnext", "depthwise"), ("test_resnet", "strided"))
     for recipe in RECIPES[preset]],
)  # fmt: skip
def test_every_method_starts_from_what_a_model_has_learned(name, recipe):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    outcome = check(model, recipe, sample(model))
    assert outcome.fit_error < 0.5


@pytest.mark.parametrize(
    ("name", "recipe"), [("mobilenet_v3_small", "dcls_gauss"), ("convnext_tiny", "smp"), ("efficientnet_b0", "genv")]
)
def test_models_of_torchvision(name, recipe):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    assert check(model, recipe, torch.randn(2, 3, 64, 64), init="random").replaced


@pytest.mark.parametrize("recipe", ["genv", "genv5"])
def test_torchvisions_resnet(recipe):
    torch.manual_seed(0)
    outcome = check(torchvision.models.resnet18(num_classes=10), recipe, torch.randn(2, 3, 64, 64))
    assert outcome.replaced >= 7


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
    [
        (convnext_of_transformers, "dcls_gauss"),
        (convnext_of_transformers, "genv"),
        (resnet_of_transformers, "genv"),
        (timm_in_transformers, "smp"),
    ],
)
def test_models_of_transformers(build, recipe):
    torch.manual_seed(0)
    assert check(build(), recipe, torch.randn(2, 3, 64, 64)).replaced


class ByHand(nn.Module):
    """A stranger's module: lists, dicts, one convolution used twice, and convolutions that can't be replaced."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.listed = nn.ModuleList([self.twice, nn.Conv2d(8, 8, 5, padding=2, groups=8)])
        self.named = nn.ModuleDict({"normed": parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1, groups=8))})
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.twice(self.stem(x)).relu()
        for conv in (*self.listed, *self.named.values(), self.up):
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


def test_a_module_written_by_hand():
    torch.manual_seed(0)
    model = ByHand()
    outcome = check(model, "dcls_gauss", torch.randn(2, 3, 32, 32))
    assert outcome.replaced == 2
    assert model.twice is model.listed[0]
    reasons = " ".join(outcome.refused)
    assert "transposed" in reasons
    assert "computed from other parameters" in reasons


#: blocks that timm's `reparameterize_model` folds; whether it can fold them with the new layers in them
FOLDING = {
    ("mobileone_s1", "dcls_gauss"): True,
    ("mobileone_s1", "genv"): False,
    ("repvit_m0_9", "dcls_gauss"): False,
    ("repvit_m0_9", "genv"): False,
    ("repvgg_a0", "genv"): False,
    ("repghostnet_050", "dcls_gauss"): False,
    ("repghostnet_050", "genv"): True,
    ("fastvit_t8", "dcls_gauss"): False,
    ("fastvit_t8", "genv"): False,
    ("efficientvit_m0", "smp"): True,
    ("efficientvit_m0", "genv"): False,
}


@pytest.mark.parametrize(("name", "recipe"), FOLDING)
def test_folding_a_patched_model_keeps_its_output_or_raises(name, recipe):
    torch.manual_seed(0)
    model = tcc.patch(timm.create_model(name, num_classes=10), recipe, init="random").eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    if not FOLDING[name, recipe]:
        assert any("fold their branches" in note and "merge" in note for note in tcc.report(model).notes)
        with pytest.raises((AssertionError, AttributeError, RuntimeError)):
            reparameterize_model(model)(images)
        return
    with torch.no_grad():
        expected, folded = output(model, images), output(reparameterize_model(model), images)
    assert torch.linalg.vector_norm(folded - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def test_kernels_as_large_as_those_before_fold_in_repvit():
    torch.manual_seed(0)
    model = timm.create_model("repvit_m0_9", num_classes=10)
    tcc.patch(model, "dcls", kernel_size=3, kernel_count=4, init="random").eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        expected, folded = output(model, images), output(reparameterize_model(model), images)
    assert torch.linalg.vector_norm(folded - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def test_a_model_that_folds_itself_is_saved_and_loaded(tmp_path):
    model = timm.create_model("mobileone_s1", num_classes=10)
    tcc.patch(model, "dcls", init="random", kernel_size=7, kernel_count=4).eval()
    loaded = tcc.from_pretrained(tcc.save_pretrained(model, tmp_path / "model")).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_model_on_the_meta_device_is_patched_as_one_with_values():
    model = tcc.patch(timm.create_model("repvit_m0_9"), "dcls_gauss", init="random")
    with torch.device("meta"):
        empty = tcc.patch(timm.create_model("repvit_m0_9"), "dcls_gauss", init="random")
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())


def test_a_convolution_that_standardises_its_weight_is_refused_and_named():
    model = timm.create_model("nf_resnet26")
    with pytest.raises(ValueError, match="ScaledStdConv2d computes its convolution in a way of its own"):
        tcc.patch(model, "genv")


def test_a_feature_extractor_is_patched_like_a_model():
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", features_only=True)
    images = torch.randn(2, 3, 64, 64)
    shapes = [feature.shape for feature in model(images)]
    assert check(model, "dcls_gauss", images).replaced == 9
    assert [feature.shape for feature in model(images)] == shapes
