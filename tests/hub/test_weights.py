"""The folders of hub/: what they say, and the weights that come with the package."""

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import get_pretrained_cfg
from torch.nn import functional as F

import timm_contconv as tcc
from timm_contconv.cli.digits import accuracy, load_digits
from timm_contconv.hub.weights import Weight, packaged_cfgs
from timm_contconv.paths import data_folder

FOLDERS = sorted(path.parent for path in data_folder("hub").glob("*/weight.toml"))
WEIGHTS = {folder.name: (folder, Weight.load(folder)) for folder in FOLDERS}
DIGITS = [name for name in WEIGHTS if name.endswith(".digits")]


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_folder_is_named_after_its_weight_and_says_who_measured_and_where_the_weights_are(name):
    folder, weight = WEIGHTS[name]
    assert name == weight.name
    assert timm.is_model(weight.architecture)
    assert weight.results
    assert all(result.by for result in weight.results)
    url = weight.pretrained_cfg.get("url", "")
    assert (folder / "model.safetensors").is_file() or url.startswith("https://") or weight.source
    assert "huggingface.co" not in url  # nothing of ours is there yet


def test_wrong_folders_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no weight\.toml"):
        Weight.load(tmp_path)
    (tmp_path / "weight.toml").write_text('architecture = "x"\ntag = "y"\nlicence = "mit"\n[pretrained_cfg]\n')
    with pytest.raises(ValueError, match="licence"):
        Weight.load(tmp_path)


@pytest.mark.parametrize("text", ["architecture = x", 'architecture = "x"\ntag = "y"\n'])
def test_a_table_that_cannot_be_read_at_import_is_named(text, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_contconv.hub.weights.data_folder", lambda name: tmp_path)
    (tmp_path / "x.y").mkdir()
    (tmp_path / "x.y" / "weight.toml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.y.weight\.toml: "):
        packaged_cfgs()


def test_every_method_has_small_weights_that_come_with_the_package():
    models = [timm.create_model(name) for name in DIGITS]
    layers = [m for model in models for m in model.modules() if isinstance(m, tcc.layers.ConvReplacement)]
    assert {layer.method for layer in layers} == {"dcls", "smp", "flex", "genv", "cc"}
    assert sum(path.stat().st_size for name in DIGITS for path in WEIGHTS[name][0].iterdir()) < 2_000_000


@pytest.mark.parametrize("name", DIGITS)
def test_digits_weights_reach_the_accuracy_that_their_card_tells(name, digits, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)  # offline
    model = timm.create_model(name, pretrained=True)
    folder, weight = WEIGHTS[name]
    (result,) = weight.results
    images = 1 / len(digits.test_labels)
    assert accuracy(model, digits) == pytest.approx(result.value / 100, abs=1.5 * images)  # one more, one less
    assert result.value > 97
    card = (folder / "README.md").read_text()
    assert f"It gets {result.value} % of the 450 held-out images right" in card
    assert ModelCard(card).data.eval_results[0].metric_value == result.value


def test_the_bare_name_of_an_architecture_still_has_1000_classes():
    for name in DIGITS:
        assert timm.create_model(name.removesuffix(".digits")).num_classes == 1000
        assert get_pretrained_cfg(name).num_classes == 10


def test_timms_transform_prepares_an_image_as_the_training_did(digits):
    from sklearn.datasets import load_digits as load

    model = timm.create_model("test_convnext_dcls_gauss.digits", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    raw = load().images
    images = torch.stack([transform(Image.fromarray(np.uint8(image * 255 / 16 + 0.5)).convert("RGB")) for image in raw])
    low, high = digits.train_images.min(), digits.train_images.max()
    expected = F.interpolate(torch.from_numpy(raw).float().unsqueeze(1), size=32, mode="bilinear") / 16
    torch.testing.assert_close(images, (low + (high - low) * expected).expand(-1, 3, -1, -1), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", DIGITS)
def test_digits_weights_adapt_to_grey_images(name, digits):
    """Trained on grey images in three equal channels: one channel holds as much."""
    model = timm.create_model(name, pretrained=True, in_chans=1).eval()
    with torch.no_grad():
        right = (model(digits.test_images[:, :1]).argmax(1) == digits.test_labels).float().mean()
    assert right > 0.97


@pytest.mark.parametrize("name", DIGITS)
def test_digits_weights_adapt_to_other_classes_and_more_channels(name):
    """Two images of three channels in one of six: as much again, scaled down."""
    three, six = (timm.create_model(name, pretrained=True, num_classes=4, in_chans=n).eval() for n in (3, 6))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        same = six.forward_features(x.repeat(1, 2, 1, 1))
        torch.testing.assert_close(same, three.forward_features(x), rtol=1e-3, atol=1e-3)
    assert six.num_classes == 4
