"""smpnet7, SMPConv's network for CIFAR-10: the paper's size, the authors' checkpoints."""

import pytest
import timm
import torch

import timm_contconv as tcc
from timm_contconv.layers import SmpConv2d
from timm_contconv.models.smpnet import SmpNet, checkpoint_filter_fn

from ..helpers import relative
from ..models_for_tests import on_meta, output
from ..peers.smpnet import ReleasedSmpNet, SmpConv, randomize_

SMALL = {"dim": 8, "width_factors": (1, 1.5), "img_size": 16, "smp_args": {"kernel_count": 9}}


def test_it_has_as_many_parameters_as_in_the_paper():
    assert sum(p.numel() for p in on_meta("smpnet7").parameters()) == 489_646


# Table 9; the paper rounds to thousands
@pytest.mark.parametrize(("points", "thousands"), [(4, 250), (8, 330), (16, 490), (32, 809), (64, 1447)])
def test_parameter_counts_by_number_of_points_are_those_of_the_paper(points, thousands):
    model = on_meta("smpnet7", smp_args={"kernel_count": points})
    assert round(sum(p.numel() for p in model.parameters()) / 1000) == thousands


def test_keys_and_shapes_of_the_release_are_those_of_the_model():
    with torch.device("meta"):
        release = ReleasedSmpNet()
    assert sum(p.numel() for p in release.parameters()) == 489_646
    model = on_meta("smpnet7")
    state = {k: torch.full((1,), 33) if k.endswith("train_length") else v for k, v in release.state_dict().items()}
    found = checkpoint_filter_fn(state, model)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[ReleasedSmpNet, str]:
    torch.manual_seed(0)
    net = randomize_(ReleasedSmpNet(width=8, factors=(1, 1.5), size=17, count=9)).eval()
    path = tmp_path_factory.mktemp("released") / "smpnet.pt"
    torch.save({"model": {f"module.{key}": value for key, value in net.state_dict().items()}}, path)
    return net, str(path)


def load(path: str, **options) -> SmpNet:
    overlay = {"pretrained_cfg_overlay": {"file": path}, "pretrained": True}
    return timm.create_model("smpnet7", **{**SMALL, **overlay, **options}).eval()


def test_a_released_checkpoint_gives_the_released_output(released):
    net, path = released
    model, images = load(path), torch.randn(2, 3, 16, 16)
    expected = output(net, images)
    assert relative(output(model, images), expected) < 1e-4
    assert relative(output(tcc.merge(model), images), expected) < 1e-4
    # and would not with any other order or sign of the coordinates
    kernels = [m for m in net.modules() if isinstance(m, SmpConv)]
    layers = [m for m in model.modules() if isinstance(m, SmpConv2d)]
    for kernel, layer in zip(kernels, layers, strict=True):
        assert relative(layer.weight, kernel.Kernel()) < 1e-4
        assert relative(layer.weight, kernel.Kernel().transpose(2, 3)) > 0.1


def test_a_released_checkpoint_loads_for_other_classes_and_channels(released):
    grey, image = load(released[1], in_chans=1, num_classes=3), torch.randn(1, 1, 16, 16)
    assert grey(image).shape == (1, 3)
    expected = load(released[1]).forward_features(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.forward_features(image), expected, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_that_does_not_fit_is_refused(released, tmp_path):
    with pytest.raises(ValueError, match="train_length=17: the checkpoint's kernels have 17 pixels, the model's 33"):
        load(released[1], img_size=32)
    state = dict(released[0].state_dict())
    del state["blocks.1.cconv2.Kernel.radius"]
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"1 missing keys: blocks\.1\.conv2\.conv\.kernel\.radius"):
        load(str(tmp_path / "wrong.pt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width_factors": ()}, "one factor per block"),
        ({"smp_args": {"small_kernel": 3}}, "smp_args={'small_kernel': 3}: expected a dict of .*kernel_count"),
        ({"smp_args": {"initial_radius": 2}}, "initial_radius=2: expected at most 1"),
        ({"small_kernel": 4}, "small_kernel=4: expected at most"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SmpNet(**options)
