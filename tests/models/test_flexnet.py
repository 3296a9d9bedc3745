"""FlexNets: the paper's sizes, the authors' checkpoints, timm's manner."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import timm_contconv as tcc
from tests.peers.flexnet import ReleasedFlexNet, randomize_
from timm_contconv.layers.flex import FlexConv2d
from timm_contconv.models.flexnet import FlexNet

from ..models_for_tests import on_meta

NAMES = ["flexnet3", "flexnet5", "flexnet7"]
SMALL = {"img_size": 16, "dim": 4, "flex_args": {"hidden_channels": 6}}


def small(name: str = "flexnet3", **options) -> FlexNet:
    return timm.create_model(name, **{**SMALL, "num_classes": 5, **options})


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16)


# ---- the paper's numbers


@pytest.mark.parametrize(("name", "millions"), [("flexnet3", 0.27), ("flexnet5", 0.44), ("flexnet7", 0.67)])
def test_parameter_counts_are_those_of_the_paper(name, millions):
    """Within 3 % of a number that the paper rounds to two places."""
    assert abs(size(on_meta(name)) - 1e6 * millions) <= 0.03 * 1e6 * millions + 5000


def test_flexnet7_has_as_many_parameters_as_the_released_one():
    assert size(on_meta("flexnet7")) == size(ReleasedFlexNet())


def test_kernels_are_as_large_as_the_images_or_one_larger():
    assert on_meta("flexnet3").stem.conv.kernel_size == (33, 33)
    assert FlexNet(img_size=np.int64(29), device="meta").blocks[2].conv2.kernel_size == (29, 29)
    assert on_meta("flexnet3", img_size=[16, 25]).blocks[2].conv2.kernel_size == (17, 25)
    assert on_meta("flexnet3", img_size=300).stem.conv.kernel_size == (301, 301)


# ---- the authors' checkpoints


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[ReleasedFlexNet, str]:
    torch.manual_seed(0)
    net = randomize_(ReleasedFlexNet(width=8, factors=(1, 1.5, 2))).eval()
    path = tmp_path_factory.mktemp("released") / "flexnet.pt"
    torch.save({"model": {f"module.{key}": value for key, value in net.state_dict().items()}}, path)  # trained parallel
    return net, str(path)


def load(path: str, **options) -> FlexNet:
    overlay = {"file": path}
    return timm.create_model("flexnet3", dim=8, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def test_a_released_checkpoint_gives_the_released_output(released):
    net, path = released
    model = load(path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
        assert (model(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (tcc.merge(model)(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_checkpoint_for_another_resolution_is_refused(released):
    with pytest.raises(ValueError, match="train_length=33: the checkpoint's kernels have 33 pixels, the model's 17"):
        load(released[1], img_size=16)


def test_a_checkpoint_with_other_keys_is_refused(released, tmp_path):
    state = dict(released[0].state_dict())
    del state["blocks.1.cconv2.Kernel.output_linear.bias"]
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="1 missing keys: blocks.1.conv2.kernel.output_bias"):
        load(str(tmp_path / "wrong.pt"))


def test_a_checkpoint_is_turned_to_other_channels_and_loses_its_classifier_for_other_classes(released):
    grey, image = load(released[1], in_chans=1, num_classes=3), torch.randn(1, 1, 32, 32)
    assert grey(image).shape == (1, 3)
    expected = load(released[1]).forward_features(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.forward_features(image), expected, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_of_ones_own_loads_as_it_is(x, tmp_path):
    model = small().eval()
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, FlexConv2d)):
            layer.kernel.mask_sigma.uniform_(0.1, 0.5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = small(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "model.pt"), "num_classes": 5})
    torch.testing.assert_close(other.eval()(x), model(x), rtol=0, atol=0)


# ---- timm's manner


# ---- resolutions, saving


def test_a_model_runs_at_another_resolution_with_one_call(x):
    model = small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tcc.at_resolution(model, 16, 32)(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert all(m.kernel_size == (33, 33) for m in model.modules() if isinstance(m, FlexConv2d))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = small().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(tcc.at_resolution(model, 32, 16)(x), fresh(x))


@pytest.mark.parametrize("img_size", [16, (16, 24)])
def test_a_saved_model_is_loaded_with_its_image_size(img_size, tmp_path):
    model = small(img_size=img_size).eval()
    tcc.save_pretrained(model, tmp_path / "model")
    images = torch.randn(2, 3, 16, 24)
    for loaded in (
        tcc.from_pretrained(tmp_path / "model"),
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True),
    ):
        torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0, atol=0)


def test_saving_warns_of_a_resolution_that_is_lost(tmp_path):
    model = tcc.at_resolution(small(), 16, 24)
    with pytest.warns(UserWarning, match=r"saved without .* stem.conv \(at 3/2 times the resolution that it was made"):
        tcc.save_pretrained(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width_factors": ()}, "one factor per block"),
        ({"img_size": 0}, "img_size=0: expected a positive int"),
        ({"img_size": True}, "img_size=True: expected a positive int"),
        ({"img_size": (16, 24, 32)}, r"img_size=\(16, 24, 32\): expected a positive int, in pixels, or two of them"),
        ({"img_size": (16, 24.5)}, r"img_size=\(16, 24.5\): expected a positive int"),
        ({"flex_args": {"kernel_size": 3}}, "flex_args={'kernel_size': 3}: expected a dict of .* img_size gives"),
        ({"flex_args": {"sigma": 3}}, "flex_args={'sigma': 3}: expected a dict of .*initial_sigma"),
        ({"flex_args": [3]}, r"flex_args=\[3\]: expected a dict of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FlexNet(**options)


# ---- in other models


def test_a_model_is_patched_merged_and_reported():
    model = timm.create_model("test_convnext", num_classes=4).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        tcc.patch(model, "flex", hidden_channels=64)
        report = tcc.report(model)
        assert max(row.fit_error for row in report.rows) < 2e-4
        torch.testing.assert_close(model(images), expected, atol=1e-3, rtol=1e-3)
        merged = tcc.merge(copy.deepcopy(model))
        torch.testing.assert_close(merged(images), model(images), atol=1e-4, rtol=1e-4)
    assert {m.kernel_size for m in merged.modules() if isinstance(m, nn.Conv2d) and m.groups > 1} == {(7, 7)}
    for row in report.rows:
        layer = model.get_submodule(row.name)
        assert row.max_frequency == pytest.approx(layer.highest_frequency())
        assert row.receptive_field_after == layer.to_conv().kernel_size
    assert "cycles/pixel" in str(report)
