"""A recipe that moves the max-pool of a residual network's stem into its first stage."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import timm_contconv as tcc

from ..models_for_tests import Snapshot, awake, output, relative

#: a method that can start exactly as the convolutions that it replaces
RECIPE = {
    "layer": {"method": "dcls", "interpolation": "bilinear", "kernel_size": 3, "kernel_count": 9},
    "select": ["layer1.0.*"],
    "min_kernel_size": 2,
    "stem_pool": "to_stage",
}
RESNETS = [lambda: timm.create_model("resnet18"), lambda: torchvision.models.resnet18()]


@pytest.mark.parametrize("build", RESNETS, ids=["timm", "torchvision"])
def test_the_first_stage_strides_in_the_place_of_the_pool(build):
    model = awake(build()).eval()
    plain = awake(build()).eval()
    plain.load_state_dict(model.state_dict())
    tcc.patch(model, RECIPE)
    plain.maxpool, plain.layer1[0].conv1.stride = nn.Identity(), (2, 2)
    plain.layer1[0].downsample = model.layer1[0].downsample
    assert [type(m) for m in plain.layer1[0].downsample] == [nn.Conv2d, nn.BatchNorm2d]
    assert plain.layer1[0].downsample[0].stride == (2, 2)
    x = torch.randn(1, 3, 64, 64)
    assert relative(output(model, x), output(plain, x)) < 1e-5


@pytest.mark.parametrize("build", RESNETS, ids=["timm", "torchvision"])
def test_unpatch_puts_the_pool_and_the_strides_back(build):
    model = awake(build()).eval()
    x, keys, text = torch.randn(1, 3, 64, 64), list(model.state_dict()), str(model)
    expected, pool = output(model, x), model.maxpool
    tcc.unpatch(tcc.patch(model, RECIPE))
    assert model.maxpool is pool
    assert list(model.state_dict()) == keys
    assert str(model) == text
    assert relative(output(model, x), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_convnext", "its `maxpool` is not an nn.MaxPool2d"),
        ("resnet26d", "its blocks don't stride in one convolution"),
    ],
)
def test_other_networks_are_refused_and_left_alone(name, reason):
    model = timm.create_model(name)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=f"stem_pool='to_stage': can't be done in this .*: {reason}"):
        tcc.patch(model, {**RECIPE, "select": ["all"]})
    assert before.differences() == []


def test_the_report_has_rows_for_what_is_exchanged():
    rows = {row.name: row for row in tcc.report(tcc.patch(timm.create_model("resnet18"), RECIPE)).rows}
    assert (rows["maxpool"].before, rows["maxpool"].after) == ("MaxPool2d", "Identity")
    assert rows["layer1.0.downsample"].parameters_after == 64 * 64 + 2 * 64
