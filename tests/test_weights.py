"""The folders of hub/: what they say, the weights that come with the package, and `contconv publish`."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import Result
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from timm.models import get_pretrained_cfg
from torch.nn import functional as F
from typer.testing import CliRunner

import timm_contconv as tcc
from timm_contconv.cli import app
from timm_contconv.cli.digits import accuracy, load_digits
from timm_contconv.weights import Weight

from .hub_server import READ_TOKEN, WRITE_TOKEN, running_hub, use_hub
from .test_convert import reference

HUB = Path(__file__).parent.parent / "hub"
FOLDERS = sorted(path.parent for path in HUB.glob("*/weight.toml"))
DIGITS = [folder for folder in FOLDERS if folder.name.endswith(".digits")]


def by_name(folder: Path) -> str:
    return folder.name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as server:
        use_hub(monkeypatch, server.url, tmp_path / "home")
        yield server


@pytest.fixture(scope="module")
def digits():
    return load_digits()


# what is in hub/


@pytest.mark.parametrize("folder", FOLDERS, ids=by_name)
def test_a_folder_is_named_after_its_weight_and_says_who_measured(folder):
    weight = Weight.load(folder)
    assert folder.name == weight.name
    assert timm.is_model(weight.architecture)
    assert weight.results
    assert all(result.by for result in weight.results)


@pytest.mark.parametrize("folder", FOLDERS, ids=by_name)
def test_weights_are_in_the_folder_or_at_a_url_or_their_place_is_told(folder):
    weight = Weight.load(folder)
    packaged = (folder / "model.safetensors").is_file()
    assert packaged or weight.pretrained_cfg.get("url", "").startswith("https://") or weight.source
    assert "huggingface.co" not in weight.pretrained_cfg.get("url", "")  # nothing of ours is there yet


def test_wrong_folders_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no weight\.toml"):
        Weight.load(tmp_path)
    (tmp_path / "weight.toml").write_text('architecture = "x"\ntag = "y"\nlicence = "mit"\n[pretrained_cfg]\n')
    with pytest.raises(ValueError, match="licence"):
        Weight.load(tmp_path)


# digits


def test_every_method_has_weights_that_come_with_the_package():
    methods = set()
    for folder in DIGITS:
        model = timm.create_model(folder.name)
        methods |= {m.method for m in model.modules() if isinstance(m, tcc.layers.ConvReplacement)}
    assert methods == {"dcls", "smp", "flex", "genv", "cc"}


def test_they_are_small():
    assert sum(path.stat().st_size for folder in DIGITS for path in folder.iterdir()) < 2_000_000


@pytest.mark.parametrize("folder", DIGITS, ids=by_name)
def test_digits_weights_reach_the_accuracy_that_their_card_tells(folder, digits, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)  # offline
    model = timm.create_model(folder.name, pretrained=True)
    (result,) = Weight.load(folder).results
    images = 1 / len(digits.test_labels)
    assert accuracy(model, digits) == pytest.approx(result.value / 100, abs=1.5 * images)  # one more, one less
    assert result.value > 97
    card = (folder / "README.md").read_text()
    assert f"It gets {result.value} % of the 450 held-out images right" in card
    assert ModelCard(card).data.eval_results[0].metric_value == result.value


def test_the_bare_name_of_an_architecture_still_has_1000_classes():
    for folder in DIGITS:
        assert timm.create_model(folder.name.removesuffix(".digits")).num_classes == 1000
        assert get_pretrained_cfg(folder.name).num_classes == 10


def test_timms_transform_prepares_an_image_as_the_training_did(digits):
    from sklearn.datasets import load_digits as load

    model = timm.create_model("test_convnext_dcls_gauss.digits", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    raw = load().images
    images = torch.stack([transform(Image.fromarray(np.uint8(image * 255 / 16 + 0.5)).convert("RGB")) for image in raw])
    low, high = digits.train_images.min(), digits.train_images.max()
    expected = F.interpolate(torch.from_numpy(raw).float().unsqueeze(1), size=32, mode="bilinear") / 16
    torch.testing.assert_close(images, (low + (high - low) * expected).expand(-1, 3, -1, -1), rtol=0, atol=0.02)


@pytest.mark.parametrize("folder", DIGITS, ids=by_name)
def test_digits_weights_adapt_to_grey_images(folder, digits):
    """Trained on grey images in three equal channels: one channel holds as much."""
    model = timm.create_model(folder.name, pretrained=True, in_chans=1).eval()
    with torch.no_grad():
        right = (model(digits.test_images[:, :1]).argmax(1) == digits.test_labels).float().mean()
    assert right > 0.97


@pytest.mark.parametrize("folder", DIGITS, ids=by_name)
def test_digits_weights_adapt_to_other_classes_and_more_channels(folder):
    """Two images of three channels in one of six: as much again, scaled down."""
    three, six = (timm.create_model(folder.name, pretrained=True, num_classes=4, in_chans=n).eval() for n in (3, 6))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        same = six.forward_features(x.repeat(1, 2, 1, 1))
        torch.testing.assert_close(same, three.forward_features(x), rtol=1e-3, atol=1e-3)
    assert six.num_classes == 4


# contconv publish


def contconv(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def released(architecture: str) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint of ours with the keys of the authors' release."""
    torch.manual_seed(0)
    model = timm.create_model(architecture)
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d)\.", r"stages.\1.\2.", key)
        key = key.replace("conv_dw.element_weight", "dwconv.weight").replace("conv_dw.geometry.position", "dwconv.P")
        key = key.replace("conv_dw.", "dwconv.").replace("mlp.fc", "pwconv")
        key = re.sub(r"^head\.norm\.", "norm.", key).replace("head.fc.", "head.")
        if "dcls_geometry.position" in key:
            stage = int(key.split(".")[1])
            for block in range(len(model.stages[stage].blocks)):
                state[f"stages.{stage}.{block}.dwconv.P"] = value
        else:
            state[key] = value
    return {"model": state}


@pytest.fixture
def authors(tmp_path):
    """A folder as those of hub/, for a small architecture, and a file as the authors released."""
    folder = tmp_path / "test_convnext_dcls.released"
    folder.mkdir()
    text = (HUB / "convnext_tiny_dcls.zenodo_in1k" / "weight.toml").read_text()
    text = text.replace("convnext_tiny_dcls", "test_convnext_dcls").replace("zenodo_in1k", "released", 1)
    (folder / "weight.toml").write_text(re.sub(r"url = \"https://zenodo.*\n", "", text))
    (folder / "train.yaml").write_text("lr: 4.0e-3\n")
    file = tmp_path / "released.pth"
    torch.save(released("test_convnext_dcls"), file)
    return folder, file


def test_publish_converts_verifies_publishes_and_records(authors, hub):
    folder, file = authors
    result = contconv("publish", folder, "--file", file)
    assert result.exit_code == 0, result.output
    files = hub.repositories["me/test_convnext_dcls.released"].files()
    assert set(files) == {".gitattributes", "README.md", "config.json", "kernels.png", "model.safetensors"}
    (record,) = tomllib.loads((folder / "published.toml").read_text())["published"]
    assert record["repo_id"] == "me/test_convnext_dcls.released"
    assert record["commit"] == hub.repositories[record["repo_id"]].refs["main"]
    assert record["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.datasets == ["imagenet-1k"]
    assert card.data.eval_results[0].metric_value == 82.5
    assert "imagenet-1k: top1 82.5 %, measured by the authors" in card.text
    assert "lr: 4.0e-3" in card.text
    pulled = tcc.from_pretrained(record["repo_id"]).eval()
    ours = timm.create_model("test_convnext_dcls", pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(pulled(x), ours(x))


def test_publish_downloads_where_the_folder_has_a_url(authors, hub, monkeypatch, tmp_path):
    folder, file = authors
    hub.blobs["released"] = file.read_bytes()
    text = (folder / "weight.toml").read_text()
    (folder / "weight.toml").write_text(
        text.replace("[pretrained_cfg]", f'[pretrained_cfg]\nurl = "{hub.url}/cdn/released"')
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    result = contconv("publish", folder)
    assert result.exit_code == 0, result.output
    (record,) = tomllib.loads((folder / "published.toml").read_text())["published"]
    assert record["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
def test_publish_the_released_tiny(hub, tmp_path):
    """At its real size, from a file with the authors' keys and the output of the authors' package."""
    folder = Path(shutil.copytree(HUB / "convnext_tiny_dcls.zenodo_in1k", tmp_path / "convnext_tiny_dcls.zenodo_in1k"))
    authors = reference("convnext_tiny_dcls")
    torch.save({"model": authors.state_dict()}, tmp_path / "convnext_dcls_tiny_1k_224_ema.pth")
    result = contconv("publish", folder, "--file", tmp_path / "convnext_dcls_tiny_1k_224_ema.pth")
    assert result.exit_code == 0, result.output
    pulled = timm.create_model("hf-hub:me/convnext_tiny_dcls.zenodo_in1k", pretrained=True).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(pulled(x), authors(x), rtol=1e-4, atol=1e-4)


def test_publishing_twice_is_recorded_twice(hub, tmp_path):
    folder = tmp_path / "test_resnet_genv.digits"
    folder.mkdir()
    for name in ("weight.toml", "model.safetensors"):
        (folder / name).write_bytes((HUB / folder.name / name).read_bytes())
    assert contconv("publish", folder).exit_code == 0
    assert contconv("publish", folder, "--repo-id", "me/again", "--private").exit_code == 0
    records = tomllib.loads((folder / "published.toml").read_text())["published"]
    assert [record["repo_id"] for record in records] == ["me/test_resnet_genv.digits", "me/again"]
    assert hub.repositories["me/again"].private


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (("missing",), WRITE_TOKEN, "has no weight.toml"),
        ((HUB / "smpconv_tiny.in1k", "--repo-id", "me/x"), WRITE_TOKEN, "get the file and pass --file"),
        ((HUB / "smpconv_tiny.in1k", "--file", "no.pth", "--repo-id", "me/x"), WRITE_TOKEN, "no such file"),
        ((DIGITS[0],), None, "hf auth login"),
        ((DIGITS[0], "--repo-id", "me/x"), READ_TOKEN, "create one with write access"),
        ((DIGITS[0], "--repo-id", "a/b/c"), WRITE_TOKEN, "Repo id"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(hub, monkeypatch, arguments, token, message):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    result = contconv("publish", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert hub.repositories == {}


def test_a_process_of_its_own_publishes_pulls_and_works_offline(tmp_path):
    """With the environment variables that users set, and nothing changed in the client."""
    folder = tmp_path / DIGITS[0].name
    folder.mkdir()
    for name in ("weight.toml", "model.safetensors"):
        (folder / name).write_bytes((DIGITS[0] / name).read_bytes())
    pull = (
        "import torch, timm, timm_contconv as tcc\n"
        "for model in (timm.create_model('hf-hub:me/model', pretrained=True), tcc.from_pretrained('me/model')):\n"
        "    print('class', model.eval()(torch.ones(1, 3, 32, 32)).argmax().item())\n"
    )
    publish = (
        "from timm_contconv.cli import app\n"
        f"app(['publish', {str(folder)!r}, '--repo-id', 'me/model'], standalone_mode=False)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITE_TOKEN}
    environment.pop("HF_HUB_OFFLINE", None)

    def classes(code: str, **variables: str) -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**environment, **variables}, check=True, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if line.startswith("class")]

    with running_hub() as server:
        online = classes(publish + pull, HF_ENDPOINT=server.url)
    assert len(online) == 2
    assert classes(pull, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1") == online
    with safe_open(next((tmp_path / "home").rglob("model.safetensors")), "pt") as file:
        assert len(list(file.keys())) > 10
