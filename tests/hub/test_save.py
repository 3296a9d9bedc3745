"""Saving to a folder that timm loads."""

import json
import os

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import timm_contconv as tcc

from ..helpers import slow_but
from ..models_for_tests import REGISTERED
from .helpers import LOADERS, assert_same_logits, small

NAMED = [
    *("test_convnext_dcls", "test_convnext_dcls_triangle", "test_convnext_dcls_gauss", "test_convnext_smp"),
    *("test_convnext_flex", "test_resnet_genv", "test_resnet_cc"),
]


def architecture(folder):
    return json.loads((folder / "config.json").read_text())["architecture"]


def test_every_method_is_among_the_named():
    methods = {tcc.load_patch(name.split("_", 2)[2]).layer.method for name in NAMED}
    assert methods == {tcc.load_patch(recipe).layer.method for recipe in REGISTERED}


@pytest.mark.parametrize("name", slow_but(NAMED, "test_convnext_dcls", "test_resnet_cc"))
def test_a_named_model_round_trip(name, tmp_path, x):
    model = timm.create_model(name, num_classes=7)
    folder = tcc.save_pretrained(model, tmp_path / "model")
    assert architecture(folder) == name
    for load in LOADERS.values():
        assert_same_logits(model, load(folder), x)


@pytest.mark.parametrize("name", slow_but(["smpconv_tiny", "flexnet3", "ccnet"], "flexnet3"))
def test_a_network_of_a_papers_own_round_trip(name, tmp_path):
    model = timm.create_model(name, num_classes=7)
    folder = tcc.save_pretrained(model, tmp_path / "model")
    assert f"{name}: " in (folder / "README.md").read_text()
    assert_same_logits(model, tcc.from_pretrained(folder), torch.randn(1, *model.pretrained_cfg["input_size"]))


@pytest.mark.parametrize("name", slow_but(NAMED, "test_convnext_dcls", "test_resnet_cc"))
def test_a_model_patched_by_hand_round_trip(name, tmp_path):
    """Of one channel and 5 classes, with float16 in the file."""
    test, base, recipe = name.split("_", 2)
    model = tcc.patch(timm.create_model(f"{test}_{base}", num_classes=5, in_chans=1), recipe, init="random").half()
    folder = tcc.save_pretrained(model, tmp_path / "model")
    assert architecture(folder) == "contconv"
    x = torch.randn(1, 1, 32, 32)
    for load in LOADERS.values():
        assert_same_logits(model.float(), load(folder), x)


def test_settings_and_builders_arguments(tmp_path, x):
    """The settings are saved; what told timm how to load the first weights is not."""
    settings = {"num_classes": 10, "patch_args": {"kernel_size": 9}}
    model = timm.create_model("test_convnext_dcls", **settings, pretrained_strict=False)
    folder = tcc.save_pretrained(model, tmp_path / "model")
    assert_same_logits(model, timm.create_model(f"local-dir:{folder}", pretrained=True), x)


def test_a_loaded_model_is_saved_again(tmp_path, x):
    model = small()
    loaded = tcc.from_pretrained(tcc.save_pretrained(model, tmp_path / "model"))
    assert_same_logits(model, tcc.from_pretrained(tcc.save_pretrained(loaded, tmp_path / "again")), x)


def test_a_named_model_that_was_patched_anew_is_saved_with_its_new_patch(tmp_path, x):
    model = timm.create_model("test_convnext_dcls", num_classes=7, patch_args={"kernel_size": 7})
    tcc.patch(tcc.unpatch(model), "dcls_gauss", init="random")
    assert_same_logits(model, tcc.from_pretrained(tcc.save_pretrained(model, tmp_path / "model")), x)


def test_predicates_are_saved_as_the_names_that_they_chose(tmp_path, x):
    model = timm.create_model("mobilenetv3_small_050", num_classes=7)
    tcc.patch(model, "dcls", init="random", select=lambda name, conv: conv.groups > 1 and conv.kernel_size[0] == 5)
    assert_same_logits(model, tcc.from_pretrained(tcc.save_pretrained(model, tmp_path / "model")), x)


@pytest.mark.parametrize(
    ("name", "recipe"), slow_but([("coat_lite_mini", "dcls"), ("coat_mini", "genv")], ("coat_lite_mini", "dcls"))
)
def test_tensors_that_have_two_names_are_saved_under_both(name, recipe, tmp_path):
    model = tcc.patch(timm.create_model(name, num_classes=2), recipe, init="random")
    folder = tcc.save_pretrained(model, tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same_logits(model, loaded, torch.randn(1, 3, 224, 224))


def test_positions_that_layers_share_are_stored_once(tmp_path):
    tcc.save_pretrained(timm.create_model("test_convnext_dcls"), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert sum(key.endswith("position") for key in file.keys()) == 4  # noqa: SIM118


def test_the_card_has_the_report(tmp_path):
    folder = tcc.save_pretrained(small(), tmp_path / "model")
    card = (folder / "README.md").read_text()
    assert "GaussianEnvelopeConv2d 1×1" in card
    assert card.startswith("---\nlibrary_name: timm")


def test_saving_draws_no_random_numbers(tmp_path):
    model, state = small(), torch.get_rng_state()
    tcc.save_pretrained(model, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


# what is refused


def with_another_stem(model):
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 5, stride=2, padding=2, bias=False)


def with_another_head(model):
    model.fc = nn.Linear(model.num_features, 3)


def with_a_layer_more(model):
    model.extra = nn.Linear(2, 2, bias=False)


def on_the_meta_device(model):
    model.fc.to("meta")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_another_stem, r"conv1\.weight is \(64, 3, 5, 5\), and \(64, 3, 7, 7\) where timm rebuilds"),
        (with_another_head, r"fc\.weight is \(3, 512\), and \(7, 512\) .* reset_classifier"),
        (with_a_layer_more, r"extra\.weight is \(2, 2\), and missing where"),
        (on_the_meta_device, r"fc\.weight is on the meta device"),
    ],
)
def test_a_model_that_timm_does_not_rebuild_is_refused(tmp_path, edit, message):
    model = timm.create_model("resnet18", num_classes=7)
    edit(model)
    tcc.patch(model, "dcls", select="layer1.0.*", kernel_size=5, kernel_count=4, init="random")
    with pytest.raises(ValueError, match=message):
        tcc.save_pretrained(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_patched_or_not_timms_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not patched"):
        tcc.save_pretrained(timm.create_model("test_convnext"), tmp_path / "model")
    own = tcc.patch(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "dcls", kernel_size=3, kernel_count=1)
    with pytest.raises(ValueError, match="was not made by timm"):
        tcc.save_pretrained(own, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# the folder


@pytest.mark.parametrize("others", [[], ["cat.jpg"], ["config.json"], [".git/HEAD"], ["train.py", "model.safetensors"]])
def test_only_an_empty_folder_or_a_saved_model_is_replaced(tmp_path, others):
    folder = tmp_path / "project"
    folder.mkdir()
    for other in others:
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("mine")
    if not others:
        assert (tcc.save_pretrained(small(), folder) / "config.json").is_file()
        return
    with pytest.raises(FileExistsError, match="holds something other than a saved model: .*; choose"):
        tcc.save_pretrained(small(), folder)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(others)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_beside_a_users_file_is_not_replaced(tmp_path, x):
    model = small()
    folder = tcc.save_pretrained(model, tmp_path / "model")
    (folder / "last.pt").write_text("mine")
    with pytest.raises(FileExistsError, match="last.pt"):
        tcc.save_pretrained(small(seed=1), folder)
    assert_same_logits(model, tcc.from_pretrained(folder), x)


def test_a_symbolic_link_is_written_through(tmp_path, x):
    tcc.save_pretrained(small(), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = small(seed=1)
    assert tcc.save_pretrained(model, tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert_same_logits(model, tcc.from_pretrained(tmp_path / "real"), x)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_folders_that_can_not_be_replaced_are_named_as_they_were_given(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    for given, reason in {".": "the current folder", "link": "a symbolic link to", "/proc": "a mount point"}.items():
        if given != "/proc" or os.path.ismount("/proc"):
            with pytest.raises(ValueError, match=f"^folder='{given}': is {reason}"):
                tcc.save_pretrained(small(), given)


def test_a_save_that_was_killed_between_its_two_moves_is_found_by_the_next_load(tmp_path, x):
    model = small()
    folder = tcc.save_pretrained(model, tmp_path / "model")
    place = tmp_path / ".model.saving-killed"
    (place / "new").mkdir(parents=True)
    folder.rename(place / "old")
    assert_same_logits(model, tcc.from_pretrained(folder), x)
    tcc.save_pretrained(small(seed=1), folder)
    assert list(tmp_path.iterdir()) == [folder]
