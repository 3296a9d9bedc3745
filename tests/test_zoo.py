"""Patching models of many families and of other libraries: the promises that `benchmarks.zoo.check` verifies."""

import json

import pytest
import timm
import torch
import torchvision
import transformers
from benchmarks.zoo import RECIPES, check, output, sample
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations

import timm_contconv as tcc
from timm_contconv.layers import ConvReplacement

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
CASES = [(name, recipe) for preset, names in TIMM.items() for name in names for recipe in RECIPES[preset]]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_models_of_timm(name, recipe):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    outcome = check(model, recipe, sample(model, name))
    assert outcome.replaced or outcome.left_alone


@pytest.mark.parametrize("recipe", ["dcls_gauss", "smp", "genv"])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny", "efficientnet_b0"])
def test_models_of_torchvision(name, recipe):
    torch.manual_seed(0)
    outcome = check(torchvision.models.get_model(name, num_classes=10), recipe, torch.randn(2, 3, 64, 64))
    assert outcome.replaced


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
    reasons = " ".join(outcome.left_alone)
    assert "transposed" in reasons
    assert "computed from other parameters" in reasons


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mobileone_s1", "dcls_gauss"),
        ("repvit_m0_9", "dcls_gauss"),
        ("fastvit_t8", "dcls_gauss"),
        ("repghostnet_050", "dcls_gauss"),
        ("repghostnet_050", "genv"),
        ("efficientvit_m0", "smp"),
    ],
)
def test_models_that_re_parameterise_themselves_still_do(name, recipe):
    torch.manual_seed(0)
    model = tcc.patch(timm.create_model(name, num_classes=10), recipe, init="random").eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        expected = output(model, images)
        folded = output(reparameterize_model(model), images)
    assert torch.linalg.vector_norm(folded - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def test_what_would_keep_a_block_from_folding_is_left_alone_and_named():
    model = tcc.patch(timm.create_model("repghostnet_050"), "dcls_gauss", init="random")
    left_alone = tcc.report(model).left_alone
    assert "RepGhostModule could no longer re-parameterise itself" in left_alone["blocks.0.0.ghost1.cheap_operation.0"]
    assert not isinstance(model.blocks[0][0].ghost1.cheap_operation[0], ConvReplacement)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mobileone_s0", {"kernel_size": 7, "kernel_count": 4}),
        ("mobileone_s1", {}),
        ("repvit_m0_9", {"kernel_size": 9}),
    ],
)
def test_models_that_re_parameterise_themselves_are_saved_and_loaded(name, settings, tmp_path):
    model = tcc.patch(timm.create_model(name, num_classes=10), "dcls", init="random", **settings).eval()
    loaded = tcc.from_pretrained(tcc.save_pretrained(model, tmp_path / "model")).eval()
    assert tcc.report(loaded).patch == tcc.report(model).patch
    assert tcc.report(loaded).left_alone.keys() == tcc.report(model).left_alone.keys()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_saved_model_without_recorded_trials_is_rebuilt_by_new_ones(tmp_path):
    model = tcc.patch(timm.create_model("repvit_m0_9"), "dcls", init="random", kernel_size=9)
    folder = tcc.save_pretrained(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key in ("foldable", "unfoldable"):
        config["model_args"]["patch"].pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert tcc.report(tcc.from_pretrained(folder)).left_alone == tcc.report(model).left_alone


def test_other_settings_are_tried_anew():
    patch = tcc.report(tcc.patch(timm.create_model("repvit_m0_9"), "dcls", init="random", kernel_size=9)).patch
    assert len(patch["unfoldable"]) == 23
    assert "unfoldable" not in tcc.PatchSpec.from_dict(patch).with_layer(kernel_size=3).to_dict()


@pytest.mark.parametrize("name", ["mobileone_s1", "repvit_m0_9", "repghostnet_050"])
def test_a_model_on_the_meta_device_is_patched_as_one_with_values(name):
    model = tcc.patch(timm.create_model(name), "dcls_gauss", init="random")
    with torch.device("meta"):
        empty = tcc.patch(timm.create_model(name), "dcls_gauss", init="random")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert tcc.report(empty).left_alone == tcc.report(model).left_alone
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())


class Depthwise(nn.Module):
    """A stranger's block whose `fuse` has nothing to do with re-parameterising."""

    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.dw = conv(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        return self.dw(x)


class FusesByModule(Depthwise):
    def __init__(self):
        super().__init__()
        self.fuse = nn.Conv2d(8, 8, 1)


class FusesTwo(Depthwise):
    def fuse(self, a, b):
        return a + b


class FusesToNothing(Depthwise):
    def fuse(self):
        return None


class FusesItself(Depthwise):
    def fuse(self):
        return self.dw


@pytest.mark.parametrize(
    "block",
    [FusesByModule(), FusesTwo(), FusesToNothing(), FusesItself(), FusesTwo(nn.Conv1d), FusesItself(nn.Conv1d)],
    ids=lambda block: f"{type(block).__name__}-{type(block.dw).__name__}",
)
def test_a_method_that_is_only_called_as_a_folding_one_is_no_obstacle(block):
    model = tcc.patch(nn.Sequential(block), "dcls", kernel_size=7, kernel_count=4)
    assert isinstance(model[0].dw, ConvReplacement)


def test_a_trial_runs_no_hooks():
    model, calls = timm.create_model("repghostnet_050"), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    tcc.patch(model, "dcls_gauss", init="random")
    assert calls == []


def test_a_convolution_that_standardises_its_weight_is_left_alone_and_named():
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
