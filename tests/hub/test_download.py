"""Pulling: files of one commit, compared with the Hub's hashes, and no others."""

import copy

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import timm_contconv as tcc

from .helpers import PULLERS, Bomb, assert_same_logits, small
from .server import READ_TOKEN, Fault, Request, running_hub, use_hub

REPO = "me/model"


@pytest.fixture(scope="module")
def published_once(tmp_path_factory):
    """A model, and what a Hub holds on which it was published."""
    with pytest.MonkeyPatch.context() as monkeypatch, running_hub() as server:
        use_hub(monkeypatch, server.url, tmp_path_factory.mktemp("home"))
        model = small()
        tcc.push_to_hub(model, REPO, private=True)
        return model, server.repositories


@pytest.fixture
def published(hub, published_once):
    """The model that `hub` already holds."""
    hub.repositories = copy.deepcopy(published_once[1])
    return published_once[0]


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[-100] ^= 0x10
    return bytes(changed)


@pytest.mark.parametrize(
    ("pull", "path", "file"),
    [
        ("create_model", "/cdn/", "model.safetensors"),
        ("from_pretrained", "/cdn/", "model.safetensors"),
        ("from_pretrained", "config.json", "config.json"),
    ],
)
def test_a_bit_that_flipped_on_the_way_is_refused_and_not_kept(hub, published, x, pull, path, file):
    hub.fail_on("GET", path, Fault(change=flip))
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        PULLERS[pull](REPO)
    hub.fault = lambda request: None
    assert_same_logits(published, PULLERS[pull](REPO), x)


def test_a_bit_that_flipped_in_the_cache_is_refused(hub, published, x, tmp_path):
    tcc.from_pretrained(REPO)
    (weights,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    weights.resolve().write_bytes(flip(weights.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        tcc.from_pretrained(REPO)
    assert_same_logits(published, tcc.from_pretrained(REPO), x)


@pytest.mark.parametrize("pull", PULLERS)
def test_a_pickle_is_not_loaded_from_a_repository(hub, published, tmp_path, pull):
    files = hub.repositories[REPO].files()
    files["pytorch_model.bin"] = Bomb(tmp_path / "bang").dumps()
    del files["model.safetensors"]
    with pytest.raises((EntryNotFoundError, FileNotFoundError), match="model.safetensors"):
        PULLERS[pull](REPO)
    assert not (tmp_path / "bang").exists()
    assert hub.asked("GET", "/cdn/") == []


def test_configuration_and_weights_are_of_one_commit(hub, published, x):
    """Somebody publishes between the two downloads."""
    repository = hub.repositories[REPO]

    def publish(request: Request) -> None:
        if request.path.endswith("model.safetensors"):
            repository.commit("main", {})

    hub.fault = publish
    assert_same_logits(published, tcc.from_pretrained(REPO), x)


@pytest.mark.parametrize("pull", PULLERS)
def test_offline_from_the_cache(hub, published, x, monkeypatch, pull):
    tcc.from_pretrained(REPO)
    hub.shutdown()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 does
    assert_same_logits(published, PULLERS[pull](REPO), x)
    with pytest.raises(LocalEntryNotFoundError, match="HF_HUB_OFFLINE is set"):
        tcc.from_pretrained("me/another")


def test_a_private_repository_needs_a_token(hub, published, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match="hf auth login"):
        tcc.from_pretrained(REPO)
    assert tcc.from_pretrained(REPO, token=READ_TOKEN).num_classes == 3


def test_names_that_are_not_there(hub, published):
    with pytest.raises(RepositoryNotFoundError, match="Check the names of the repository and the revision"):
        tcc.from_pretrained("me/nothing")
    with pytest.raises(RevisionNotFoundError, match="Check the names"):
        tcc.from_pretrained(REPO, revision="v9")
    with pytest.raises(ValueError, match="is a folder, which has no revisions"):
        tcc.from_pretrained("/tmp", revision="v9")
