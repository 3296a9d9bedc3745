"""timm's own folding for inference, after a patch: the same output, or an error; never silently another one."""

import copy

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.patching import plan_patch

from ..helpers import relative, slow_but
from ..models_for_tests import create, layers_of, output, scatter

#: the smallest model of each family that folds, and, of those that have one, an argument that makes it smaller
MODELS = {
    "mobileone_s1": {},
    "fastvit_t8": {"layers": (1, 1, 1, 1)},
    "repvit_m0_9": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "shvit_s1": {},
    "iformer_t": {},
    "efficientvim_m1": {},
    "levit_128s": {},
    "repvgg_a0": {},
    "repghostnet_050": {},
    "lcnetv2_small": {},
}
DCLS = {"kernel_size": 9, "kernel_count": 4}
PATCHES = {"dcls": {**DCLS, "select": ["depthwise", "strided"]}, "genv": {}, "cc": {}}


def images(model: nn.Module) -> torch.Tensor:
    config = model.pretrained_cfg
    return torch.randn(1, 3, *(config["input_size"][1:] if config.get("fixed_input_size") else (64, 64)))


QUICK = ("fastvit_t8", "repvgg_a0")


@pytest.mark.parametrize("name", slow_but(MODELS, *QUICK))
def test_a_patched_model_folds_to_the_same_output_or_raises(name):
    plain = create(name, **MODELS[name])
    x = images(plain)
    del plain.pretrained_cfg  # without an image size a report counts no multiply-adds, which takes long
    for recipe, settings in PATCHES.items():
        model = scatter(tcc.patch(copy.deepcopy(plain), recipe, init="random", **settings))
        notes = tcc.report(model).notes
        try:
            folded = reparameterize_model(model)
        except (AssertionError, AttributeError, RuntimeError):
            assert "merge, or use the model unfolded" in str(notes)
        else:
            assert relative(output(folded, x), output(model, x)) < 1e-4
            assert notes or len(layers_of(folded)) == len(layers_of(model))


@pytest.mark.parametrize(
    ("name", "select"),
    [
        ("mobileone_s1", "depthwise"),
        ("efficientvit_m0", "depthwise"),
        ("tiny_vit_5m_224", "depthwise"),
        ("iformer_t", "depthwise"),
        ("levit_128s", "strided"),
    ],
)
def test_blocks_that_ask_their_convolutions_fold_constructed_kernels(name, select):
    model = scatter(tcc.patch(create(name, **MODELS[name]), "dcls", init="random", **DCLS, select=select))
    x = images(model)
    folded = reparameterize_model(model)
    assert layers_of(folded) == []
    assert relative(output(folded, x), output(model, x)) < 1e-4


class Branch(nn.Module):
    """Folds as LCNetV2's blocks do: into a kernel of the size that it noted, and a larger kernel loses its rim."""

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.kernel_size = size
        self.conv = nn.Conv2d(4, 4, size, padding=size // 2, groups=4)

    def forward(self, x):
        return self.conv(x)

    def reparameterize(self):
        cut = (self.kernel_size - self.conv.kernel_size[0]) // 2
        folded = nn.Conv2d(4, 4, self.kernel_size, padding=self.kernel_size // 2, groups=4)
        folded.weight.data, folded.bias.data = F.pad(self.conv.weight, (cut,) * 4), self.conv.bias
        self.conv = folded


def test_a_block_that_folds_kernels_of_one_size_refuses_to_cut_others():
    model = nn.Sequential(Branch())
    assert plan_patch(model, "dcls", **DCLS).unfoldable == {"0": "kernel_size=5"}
    scatter(tcc.patch(model, "dcls", **DCLS))
    for changed in (model, tcc.merge(model)):
        with pytest.raises(RuntimeError, match="Branch: folds kernels of kernel_size=5 only"):
            reparameterize_model(changed)
    for position in (layer.geometry["position"] for layer in layers_of(model)):
        position.data.clamp_(-2, 2)
    reparameterize_model(tcc.unpatch(model))


def test_a_block_whose_kernels_keep_their_size_folds():
    model = scatter(tcc.patch(nn.Sequential(Branch()), "dcls", kernel_size=5, kernel_count=4))
    x = torch.randn(1, 4, 9, 9)
    assert relative(output(reparameterize_model(model), x), output(model, x)) < 1e-5


def test_a_fold_that_would_pad_too_little_is_refused():
    model = create("fastvit_mci3", layers=(1,) * 5, embed_dims=(16, 32, 64, 64, 64))
    scatter(tcc.patch(model, "dcls", init="random", **DCLS, select="stem.1.*"))
    with pytest.raises(RuntimeError, match="MobileOneBlock: folds kernels of kernel_size=3 only"):
        reparameterize_model(model)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_written_into_a_constructed_weight_changes_nothing(training):
    layer = tcc.layers.DclsConv2d(4, 4, 5, groups=4, kernel_count=3).train(training)
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        expected = layer(x)
        layer.weight.data.zero_()
        layer.weight.zero_()
        assert torch.equal(layer(x), expected)
    with pytest.raises(AttributeError, match="it is constructed and can't be set"):
        layer.weight = nn.Parameter(torch.zeros(4, 1, 5, 5))
