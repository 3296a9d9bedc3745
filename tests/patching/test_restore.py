"""Merging and unpatching."""

import pytest
import timm
import torch
from torch import nn

import timm_contconv as tcc
from timm_contconv.layers import ConvReplacement

from ..helpers import relative
from ..models_for_tests import REGISTERED, Snapshot, awake, create, geometry_of, layers_of, output, scatter

IMAGES = (2, 3, 64, 64)
BASES = {recipe: tcc.load_patch(recipe).models[-1] for recipe in REGISTERED}  # the smallest comes last


def patched(recipe: str, **settings) -> nn.Module:
    settings = {"init": "random", **({"kernel_count": 4} if recipe.startswith("dcls") else {}), **settings}
    base = "resnet18" if recipe == "genv5" else BASES[recipe]
    return scatter(tcc.patch(create(base), recipe, **settings)).eval()


@pytest.mark.parametrize("recipe", REGISTERED)
def test_merge_gives_the_same_output_and_leaves_the_model_alone(recipe):
    model = patched(recipe)
    x = torch.randn(IMAGES)
    expected, before = output(model, x), Snapshot(model)
    merged = tcc.merge(model)
    assert before.differences() == []
    assert not any(isinstance(module, ConvReplacement) for module in merged.modules())
    assert relative(output(merged, x), expected) < 1e-4
    assert tcc.merge(model, inplace=True) is model
    assert relative(output(model, x), expected) < 1e-4
    assert not any("geometry" in key for key in model.state_dict())
    with pytest.raises(ValueError, match="is not patched"):
        tcc.report(model)


def test_merging_what_holds_a_patched_model_leaves_nothing_of_the_patch():
    model = nn.Sequential(patched("dcls"))
    tcc.merge(model, inplace=True)
    assert list(model[0].state_dict()) == list(timm.create_model("test_convnext").state_dict())
    assert "no_weight_decay" not in vars(model[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("test_convnext"), "holds no layer of timm_contconv"),
        (lambda: layers_of(patched("dcls"))[0], r"a lone DclsConv2d can't be merged in place; call its to_conv\(\)"),
    ],
)
def test_what_can_not_be_merged_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        tcc.merge(model())


def test_unpatch_restores_the_architecture_where_kernels_fit():
    model = patched("dcls", kernel_size=11)
    with torch.no_grad():
        for position in geometry_of(model, "position"):
            position.clamp_(-2.5, 2.5)
    x = torch.randn(IMAGES)
    expected = output(model, x)
    assert tcc.unpatch(model) is model
    plain = timm.create_model("test_convnext", num_classes=10).eval()
    plain.load_state_dict(model.state_dict())
    assert relative(output(plain, x), expected) < 1e-4
    tcc.patch(model, "dcls_gauss", init="random")  # and it can be patched again


def test_unpatch_names_kernels_that_are_too_large():
    model = tcc.patch(create("test_convnext"), "dcls", init="random", kernel_size=11)
    geometry_of(model, "position")[0].data.fill_(5)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"beyond the original size: stages.0.blocks.0.conv_dw") as caught:
        tcc.unpatch(model)
    assert "stages.1.blocks.0" not in str(caught.value)
    assert before.differences() == []


def prune(model):
    model.prune_intermediate_layers([0])


def exchange(model):
    model.stages[3].blocks[1].conv_dw = nn.Identity()


@pytest.mark.parametrize("change", [prune, exchange])
def test_a_model_whose_layers_are_gone_can_be_merged_but_not_unpatched(change):
    model = awake(timm.create_model("test_convnext_dcls"))
    change(model)
    before = Snapshot(model)
    for verb in (tcc.unpatch, tcc.report):
        with pytest.raises(ValueError, match=r"changed since it was patched: .*stages.3.blocks.1.conv_dw are gone"):
            verb(model)
    assert before.differences() == []
    tcc.merge(model, inplace=True)
    assert layers_of(model) == []
    assert not any("geometry" in key for key in model.state_dict())


@pytest.mark.parametrize(("size", "channels_last"), [((9, 9), False), ((13, 1), False), ((1, 13), True)])
def test_merged_depthwise_kernels_are_channels_last_where_they_are_wide(size, channels_last):
    """PyTorch runs the others faster on plain images, and gives outputs in the format that it ran in."""
    conv = nn.Conv2d(8, 8, size, padding=(size[0] // 2, size[1] // 2), groups=8)
    merged = tcc.merge(tcc.patch(nn.Sequential(conv), "engine", select="all"))
    y = merged(torch.randn(1, 8, 16, 16))
    assert y.is_contiguous() is not channels_last
