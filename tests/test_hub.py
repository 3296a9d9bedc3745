"""Folders that timm loads."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import timm_contconv as tcc


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


@torch.no_grad()
def assert_same_logits(model, other, x):
    assert torch.equal(model.eval()(x), other.eval()(x))


def hand_patched(**options) -> nn.Module:
    model = timm.create_model("test_efficientnet", num_classes=7, **options)
    return tcc.patch(model, "dcls_gauss", kernel_size=9, init="random")


NAMED = [
    *("test_convnext_dcls", "test_convnext_dcls_triangle", "test_convnext_dcls_gauss", "test_convnext_smp"),
    *("test_convnext_flex", "test_resnet_genv", "test_resnet_cc"),
]


def test_every_method_is_among_the_named():
    methods = {tcc.load_patch(name.split("_", 2)[2]).layer.method for name in NAMED}
    assert methods == {tcc.load_patch(recipe).layer.method for recipe in tcc.list_patches()}


@pytest.mark.parametrize("name", NAMED)
def test_named_model_round_trip(name, tmp_path, x):
    model = timm.create_model(name, num_classes=7)
    tcc.save_pretrained(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architecture"] == name
    assert_same_logits(model, timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True), x)
    assert_same_logits(model, tcc.from_pretrained(tmp_path / "model"), x)


@pytest.mark.parametrize("name", ["smpconv_tiny", "flexnet3", "ccnet"])
def test_a_network_of_a_papers_own_round_trip(name, tmp_path):
    model = timm.create_model(name, num_classes=7)
    card = (tcc.save_pretrained(model, tmp_path / "model") / "README.md").read_text()
    assert f"{name}: " in card
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert_same_logits(model, tcc.from_pretrained(tmp_path / "model"), x)


def test_named_model_with_other_settings_round_trip(tmp_path):
    model = timm.create_model("test_convnext_dcls", num_classes=7, in_chans=1, patch_args={"kernel_size": 9})
    tcc.save_pretrained(model, tmp_path / "model")
    x = torch.randn(1, 1, 64, 64)
    assert_same_logits(model, timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True), x)


@pytest.mark.parametrize("name", NAMED)
def test_hand_patched_models_of_other_classes_and_channels_in_half_precision(name, tmp_path):
    """As in the named ones, by hand: one channel, 5 classes, float16 in the file."""
    test, base, recipe = name.split("_", 2)
    model = tcc.patch(timm.create_model(f"{test}_{base}", num_classes=5, in_chans=1), recipe, init="random").half()
    folder = tcc.save_pretrained(model, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "contconv"
    x = torch.randn(1, 1, 32, 32)
    for loaded in (tcc.from_pretrained(folder), timm.create_model(f"local-dir:{folder}", pretrained=True)):
        assert loaded.num_classes == 5
        assert_same_logits(model.float(), loaded, x)


def test_hand_patched_model_round_trip(tmp_path, x):
    model = hand_patched()
    tcc.save_pretrained(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "contconv"
    assert set(config["model_args"]) == {"base", "base_args", "patch"}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert type(loaded) is type(model)
    assert_same_logits(model, loaded, x)
    tcc.save_pretrained(loaded, tmp_path / "again")
    assert_same_logits(model, tcc.from_pretrained(tmp_path / "again"), x)


def test_predicates_are_saved_as_the_names_that_they_chose(tmp_path, x):
    model = timm.create_model("mobilenetv3_small_050", num_classes=7)
    tcc.patch(model, "dcls", init="random", select=lambda name, conv: conv.groups > 1 and conv.kernel_size[0] == 5)
    tcc.save_pretrained(model, tmp_path / "model")
    assert_same_logits(model, tcc.from_pretrained(tmp_path / "model"), x)


def test_a_loaded_model_adapts_to_other_classes_and_channels(tmp_path):
    tcc.save_pretrained(hand_patched(), tmp_path / "model")
    model = tcc.from_pretrained(tmp_path / "model", num_classes=3, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3)


def test_a_named_model_that_was_patched_anew_is_saved_with_its_new_patch(tmp_path, x):
    model = timm.create_model("test_convnext_dcls", num_classes=7, patch_args={"kernel_size": 7})
    tcc.patch(tcc.unpatch(model), "dcls_gauss", init="random")
    tcc.save_pretrained(model, tmp_path / "model")
    assert_same_logits(model, tcc.from_pretrained(tmp_path / "model"), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foo": 1}, "^foo=1: timm can't build"),
        ({"in_chans": -1, "num_classes": 3}, "^in_chans=-1, num_classes=3: timm can't build"),
        ({"num_classes": "3"}, "^num_classes='3': expected an int of at least 0"),
        ({"num_classes": -1}, "^num_classes=-1: expected an int of at least 0"),
        ({"pretrained": False}, "^pretrained=False: not an argument of from_pretrained"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(tmp_path, arguments, message):
    tcc.save_pretrained(hand_patched(), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        tcc.from_pretrained(tmp_path / "model", **arguments)


def test_a_configuration_that_does_not_fit_is_named_whatever_the_arguments(tmp_path):
    folder = tcc.save_pretrained(hand_patched(), tmp_path / "model")
    change_config(folder, lambda config: config["model_args"]["base_args"].__setitem__("foo", 1))
    with pytest.raises(ValueError, match=r"config\.json: timm can't build"):
        tcc.from_pretrained(folder, num_classes=3)


def test_shared_positions_are_stored_once(tmp_path):
    tcc.save_pretrained(timm.create_model("test_convnext_dcls"), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert sum(key.endswith("position") for key in file.keys()) == 4  # noqa: SIM118


def test_the_card_has_the_report_and_a_picture(tmp_path):
    folder = tcc.save_pretrained(hand_patched(), tmp_path / "model")
    card = (folder / "README.md").read_text()
    assert "DclsConv2d 9×9" in card
    assert card.startswith("---\nlibrary_name: timm")
    assert (folder / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path, x):
    tcc.save_pretrained(hand_patched(), tmp_path / "model")
    second = hand_patched()
    tcc.save_pretrained(second, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_logits(second, tcc.from_pretrained(tmp_path / "model"), x)


def test_a_failed_save_leaves_the_old_folder(tmp_path, x, monkeypatch):
    model = hand_patched()
    tcc.save_pretrained(model, tmp_path / "model")
    monkeypatch.setattr(tcc.hub, "write_card", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tcc.save_pretrained(hand_patched(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_logits(model, tcc.from_pretrained(tmp_path / "model"), x)


def test_what_can_not_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not patched"):
        tcc.save_pretrained(timm.create_model("test_convnext"), tmp_path / "model")
    with pytest.raises(ValueError, match="is not patched"):
        tcc.save_pretrained(tcc.merge(timm.create_model("test_convnext_dcls")), tmp_path / "model")
    own = tcc.patch(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "dcls", kernel_size=3, kernel_count=1)
    with pytest.raises(ValueError, match="was not made by timm"):
        tcc.save_pretrained(own, tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(FileExistsError, match="holds something other than a saved model"):
        tcc.save_pretrained(hand_patched(), tmp_path / "photos")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def with_another_stem(model):
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 5, stride=2, padding=2, bias=False)


def with_another_head(model):
    model.fc = nn.Linear(model.num_features, 3)


def with_a_layer_more(model):
    model.extra = nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_another_stem, r"conv1\.weight is \(64, 3, 5, 5\), and \(64, 3, 7, 7\) where timm rebuilds"),
        (with_another_head, r"fc\.weight is \(3, 512\), and \(7, 512\) .* reset_classifier"),
        (with_a_layer_more, r"extra\.weight is \(2, 2\), and missing where"),
    ],
)
def test_a_model_that_timm_does_not_rebuild_is_refused(tmp_path, edit, message):
    model = timm.create_model("resnet18", num_classes=7)
    edit(model)
    tcc.patch(model, "dcls", select="layer1.0.*", kernel_size=5, kernel_count=4, init="random")
    with pytest.raises(ValueError, match=message):
        tcc.save_pretrained(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saving_draws_no_random_numbers(tmp_path):
    model, state = hand_patched(), torch.get_rng_state()
    tcc.save_pretrained(model, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return tcc.save_pretrained(hand_patched(), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def saved(saved_once, tmp_path):
    return Path(shutil.copytree(saved_once, tmp_path / "model"))


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_weights_file_is_refused(saved, keep):
    weights = saved / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match="damaged or cut short"):
        tcc.from_pretrained(saved)


@pytest.mark.parametrize("other", [".git/HEAD", "ckpt/last.pt", "train.py", "pytorch_model.bin"])
def test_a_folder_that_holds_more_than_a_saved_model_is_not_replaced(saved, other):
    (saved / other).parent.mkdir(exist_ok=True)
    (saved / other).write_text("mine")
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    message = f"holds something other than a saved model: {other.split('/')[0]}. .*; choose a new one"
    with pytest.raises(FileExistsError, match=message):
        tcc.save_pretrained(hand_patched(), saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_configuration_without_weights_is_not_replaced(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"config\.json, but no model\.safetensors"):
        tcc.save_pretrained(hand_patched(), tmp_path / "project")
    assert (tmp_path / "project" / "config.json").read_text() == "mine"


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    tcc.save_pretrained(hand_patched(), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("load", [tcc.from_pretrained, lambda f: timm.create_model(f"local-dir:{f}", pretrained=True)])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "evil", "expected one of dcls"),
        ("kernel_size", 10**6, "kernel_size=1000000: expected an int from 1 to 255"),
        ("kernel_count", 10**9, "kernel_count=1000000000"),
        ("code", "import os", "layer.code is not a field"),
    ],
)
def test_a_configuration_that_asks_for_too_much_is_refused(saved, load, key, value, message):
    change_config(saved, lambda config: config["model_args"]["patch"]["layer"].__setitem__(key, value))
    with pytest.raises(ValueError, match=re.escape(message)):
        load(saved)


def test_an_unknown_architecture_and_missing_files_are_named(saved):
    change_config(saved, lambda config: config.__setitem__("architecture", "resnet9000"))
    with pytest.raises(ValueError, match="architecture='resnet9000'"):
        tcc.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        tcc.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        tcc.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        tcc.from_pretrained(saved / "nothing" / "here")


def test_keys_that_do_not_fit_are_named(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    tensors["surplus"] = tensors.pop("conv_stem.weight")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match="1 missing keys: conv_stem.weight; 1 unexpected keys: surplus"):
        tcc.from_pretrained(saved)
