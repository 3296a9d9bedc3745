"""`contconv publish`, against a Hub on the loopback interface."""

import hashlib
import shutil
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

import timm_contconv as tcc
from contconv import app
from timm_contconv.paths import data_folder

from .helpers import assert_same_logits
from .server import READ_TOKEN, WRITE_TOKEN

HUB = data_folder("hub")
NAME = "test_resnet_genv.digits"


def contconv(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def published(folder: Path) -> list[dict]:
    return tomllib.loads((folder / "published.toml").read_text())["published"]


@pytest.fixture
def packaged(tmp_path):
    """A folder of hub/ that holds its weights."""
    return Path(shutil.copytree(HUB / NAME, tmp_path / NAME))


@pytest.fixture
def released(packaged, tmp_path):
    """A folder that holds none, as for weights that others released, and the file that they released."""
    text = (packaged / "weight.toml").read_text()
    origin = 'license = "mit"\norigin_url = "https://x.org"'
    (packaged / "weight.toml").write_text(text.replace('license = "apache-2.0"', origin))
    (packaged / "train.yaml").write_text("lr: 4.0e-3\n")
    return packaged, (packaged / "model.safetensors").rename(tmp_path / "released.safetensors")


def test_it_verifies_publishes_and_records(released, hub, x):
    folder, file = released
    result = contconv("publish", folder, "--file", file)
    assert result.exit_code == 0, result.output
    (record,) = published(folder)
    assert record["repo_id"] == f"me/{NAME}"
    assert record["commit"] == hub.repositories[record["repo_id"]].refs["main"]
    assert record["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    card = ModelCard(hub.repositories[record["repo_id"]].files()["README.md"].decode())
    assert card.data.license == "mit"
    assert (
        card.data.eval_results[0].metric_value
        == tomllib.loads((folder / "weight.toml").read_text())["results"][0]["value"]
    )
    assert "released at https://x.org" in card.text
    assert "lr: 4.0e-3" in card.text
    assert_same_logits(tcc.from_pretrained(record["repo_id"]), timm.create_model(NAME, pretrained=True), x)


def test_it_downloads_where_the_folder_has_a_url(released, hub, monkeypatch, tmp_path):
    folder, file = released
    torch.save(load_file(file), tmp_path / "released.pth")
    hub.blobs["released"] = content = (tmp_path / "released.pth").read_bytes()
    text = (folder / "weight.toml").read_text()
    url = f'url = "{hub.url}/cdn/released"'
    (folder / "weight.toml").write_text(text.replace("[pretrained_cfg]", f"[pretrained_cfg]\n{url}"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert contconv("publish", folder).exit_code == 0
    assert published(folder)[0]["source_sha256"] == hashlib.sha256(content).hexdigest()


def test_publishing_twice_is_recorded_twice(packaged, hub):
    assert contconv("publish", packaged).exit_code == 0
    assert contconv("publish", packaged, "--repo-id", "me/again", "--private").exit_code == 0
    assert [record["repo_id"] for record in published(packaged)] == [f"me/{NAME}", "me/again"]
    assert hub.repositories["me/again"].private


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (("missing",), WRITE_TOKEN, "has no weight.toml"),
        ((HUB / "smpconv_tiny.in1k", "--repo-id", "me/x"), WRITE_TOKEN, "get the file and pass --file"),
        ((HUB / "smpconv_tiny.in1k", "--file", "no.pth", "--repo-id", "me/x"), WRITE_TOKEN, "no such file"),
        ((HUB / NAME,), None, "hf auth login"),
        ((HUB / NAME, "--repo-id", "me/x"), READ_TOKEN, "create one with write access"),
        ((HUB / NAME, "--repo-id", "a/b/c"), WRITE_TOKEN, "Repo id"),
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
