"""Which convolutions are replaced, and why others are not."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import timm_contconv as tcc
from timm_contconv.layers import DclsConv2d, SmpConv2d

from ..models_for_tests import layers_of

SMALL = {"kernel_size": 5, "kernel_count": 2, "init": "random"}


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("depthwise", 9),
        ("stages.2.*.conv_dw", 4),
        (["stages.1.*dw", "stages.3.*dw"], 4),
        ("!stages.2.*", 5),
        (["depthwise", "!stages.2.*"], 5),
        (lambda name, conv: conv.out_channels == 64 and conv.groups > 1, 2),
        (["stages.0.*dw", lambda name, conv: name == "stages.1.blocks.0.conv_dw"], 2),
    ],
)
def test_selection(select, expected):
    model = tcc.patch(timm.create_model("test_convnext"), "dcls", select=select, init="random", kernel_count=3)
    assert len(layers_of(model)) == expected


def test_strided_and_all_are_presets_and_small_kernels_can_be_left_out():
    model = timm.create_model("test_resnet")
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    wanted = {
        ("strided", 1): sum(max(conv.stride) > 1 for conv in convs),
        ("all", 1): len(convs),
        ("all", 3): sum(max(conv.kernel_size) >= 3 for conv in convs),
    }
    for (select, smallest), expected in wanted.items():
        patched = tcc.patch(copy.deepcopy(model), "dcls", select=select, min_kernel_size=smallest, **SMALL)
        assert len(layers_of(patched)) == expected


class Mixed(nn.Module):
    """A stranger's module with things that can and can't be replaced, and one convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.again = self.first
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4)
        self.even = nn.Conv2d(4, 4, 2, padding=1, groups=4)
        self.normed = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1, groups=4))
        self.listed = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, groups=4)])
        self.named = nn.ModuleDict({"last": nn.Conv2d(4, 4, 3, padding=1, groups=4)})

    def forward(self, x):
        return self.named["last"](self.listed[0](self.normed(self.even(self.up(self.again(self.first(x)))))))


def test_what_can_not_be_replaced_is_left_and_named():
    model = tcc.patch(Mixed(), "dcls", select="all", **SMALL)
    assert model.again is model.first
    assert all(isinstance(layer, DclsConv2d) for layer in (model.first, model.listed[0], model.named["last"]))
    refused = tcc.report(model).refused
    assert refused.keys() == {"up", "even", "normed"}
    assert refused["up"] == "transposed convolution"
    assert "can't be centred on a (2, 2) kernel" in refused["even"]
    assert refused["normed"].startswith("its weight is computed from other parameters")
    assert model(torch.randn(1, 4, 8, 8)).shape == (1, 4, 9, 9)


class Tangled(nn.Module):
    """Convolutions that share a weight, one that a plain list holds too, and one that nothing else knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.listed, self.free = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(4))
        self.b.weight = self.a.weight
        self.order = [self.listed]


def test_a_convolution_that_something_else_depends_on_is_left_and_named():
    model = tcc.patch(Tangled(), "dcls", **SMALL)
    refused = tcc.report(model).refused
    assert refused["a"] == "its weight is shared with 'b'"
    assert refused["b"] == "its weight is shared with 'a'"
    assert refused["listed"].startswith("'order' holds it too")
    assert model.b.weight is model.a.weight
    assert isinstance(model.free, DclsConv2d)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "no shape yet: run the model once"),
        (lambda: timm.create_model("nf_resnet26"), "ScaledStdConv2d computes its convolution in a way of its own"),
    ],
)
def test_where_nothing_can_be_replaced_the_reasons_are_in_the_error(model, reason):
    with pytest.raises(ValueError, match=f"dcls can replace none of the selected convolutions:\n.*{reason}"):
        tcc.patch(model(), "dcls", select="all", **SMALL)


def test_settings_by_stage_are_those_of_the_stage_also_in_a_feature_extractor():
    def sizes(**options) -> list[tuple[int, ...]]:
        model = tcc.patch(timm.create_model("test_convnext", **options), "smp", init="random")
        return [m.kernel_size for m in layers_of(model)]

    assert sizes(features_only=True) == sizes()
    model = tcc.patch(timm.create_model("test_resnet"), "smp", select="layer*.conv2", init="random")
    found = {name.split(".")[0]: m.kernel_size[0] for name, m in model.named_modules() if isinstance(m, SmpConv2d)}
    recipe = [stage["kernel_size"] for stage in tcc.load_patch("smp").by_stage]
    assert found == {"layer1": recipe[1], "layer2": recipe[2], "layer3": recipe[3], "layer4": recipe[3]}  # 0: the stem
