"""The Hub: publishing and pulling, with huggingface_hub's own client against a server on the loopback interface."""

import copy
import logging
import pickle
import re
import traceback

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import timm_contconv as tcc

from .hub_server import READ_TOKEN, WRITE_TOKEN, Entry, Fault, Request, running_hub, use_hub

REPO = "me/model"
FILES = {"README.md", "config.json", "kernels.png", "model.safetensors"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as server:
        use_hub(monkeypatch, server.url, tmp_path / "home")
        yield server


@pytest.fixture(scope="module")
def published_once(tmp_path_factory):
    """A model, and what a Hub holds on which it was published."""
    with pytest.MonkeyPatch.context() as monkeypatch, running_hub() as server:
        use_hub(monkeypatch, server.url, tmp_path_factory.mktemp("home"))
        model = small()
        tcc.push_to_hub(model, REPO)
        return model, server.repositories, server.blobs


@pytest.fixture
def published(hub, published_once):
    """The model that `hub` already holds."""
    model, repositories, blobs = published_once
    hub.repositories, hub.blobs = copy.deepcopy(repositories), dict(blobs)
    return model


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's pauses between retries take no time."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def small(seed=0, **options) -> torch.nn.Module:
    """The quickest model to publish: one layer patched by hand."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=3, **options)
    return tcc.patch(model, "genv", select="layer4.0.downsample.*", init="random")


@torch.no_grad()
def assert_same_logits(model, other, x):
    assert torch.equal(model.eval()(x), other.eval()(x))


def asked(hub, method, path="") -> list[Request]:
    return [r for r in hub.requests if r.method == method and re.search(path, r.path)]


# publishing and pulling


@pytest.mark.parametrize(
    "name",
    ["test_convnext_dcls_gauss", "test_convnext_smp", "test_convnext_flex", "test_resnet_genv", "test_resnet_cc"],
)
def test_a_named_model_round_trip(name, hub, x):
    model = timm.create_model(name, num_classes=7)
    tcc.push_to_hub(model, REPO)
    assert_same_logits(model, timm.create_model(f"hf-hub:{REPO}", pretrained=True), x)
    assert_same_logits(model, tcc.from_pretrained(REPO), x)


def test_a_hand_patched_model_round_trip(hub, x):
    model = small()
    tcc.push_to_hub(model, REPO)
    assert_same_logits(model, timm.create_model(f"hf-hub:{REPO}", pretrained=True), x)
    assert_same_logits(model, tcc.from_pretrained(REPO), x)


def test_a_network_of_a_papers_own_round_trip(hub, x, monkeypatch):
    model = timm.create_model("smpconv_tiny", num_classes=2, depths=(1, 1, 1, 1), dims=(16, 32, 48, 64))
    tcc.push_to_hub(model, REPO)
    assert_same_logits(model, timm.create_model(f"hf-hub:{REPO}", pretrained=True), x)
    assert_same_logits(model, tcc.from_pretrained(REPO), x)


def test_half_precision_is_published_as_it_is(hub, x):
    model = small().half()
    tcc.push_to_hub(model, REPO)
    loaded = tcc.from_pretrained(REPO)
    assert next(loaded.parameters()).dtype == torch.float32
    assert_same_logits(model, loaded.half(), x.half())


def test_other_classes_and_channels_on_pulling(hub, published):
    for load in (tcc.from_pretrained, lambda name, **k: timm.create_model(f"hf-hub:{name}", pretrained=True, **k)):
        assert load(REPO, num_classes=5, in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_everything_goes_in_one_commit_after_one_upload_of_each_large_file(hub):
    info = tcc.push_to_hub(small(), REPO)
    repository = hub.repositories[REPO]
    assert set(repository.files()) == {*FILES, ".gitattributes"}
    assert len(repository.commits) == 2  # that of the repository's creation, and ours
    assert repository.refs["main"] == info.oid
    assert len(asked(hub, "PUT")) == 2
    assert asked(hub, "POST", "/commit/")[0].number == len(hub.requests) - 1


def test_publishing_the_same_again_makes_no_commit(hub):
    model = small()
    first = tcc.push_to_hub(model, REPO)
    second = tcc.push_to_hub(model, REPO)
    assert first.oid == second.oid
    assert len(asked(hub, "POST", "/commit/")) == 1


def test_large_files_in_parts(tmp_path, monkeypatch, x):
    with running_hub(part_size=200_000) as server:
        use_hub(monkeypatch, server.url, tmp_path / "home")
        model = small()
        tcc.push_to_hub(model, REPO)
        assert len(asked(server, "PUT", r"/lfs/\w+/\d+")) > 2
        assert_same_logits(model, tcc.from_pretrained(REPO), x)


def test_the_usage_block_of_the_card_runs(hub, published, x):
    card = hub.repositories[REPO].files()["README.md"].decode()
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert_same_logits(published, names["model"], x)


def test_the_card_carries_what_was_given(hub):
    source = {"source_name": "me", "source_url": "https://x.org"}
    result = EvalResult("image-classification", "digits", "Digits", "accuracy", 98.5, **source)
    tcc.push_to_hub(
        small(), REPO, tags=["mine"], license="mit", datasets=["digits"], base_model="timm/x", eval_results=[result]
    )
    card = ModelCard(hub.repositories[REPO].files()["README.md"].decode())
    data = card.data.to_dict()
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["timm", "timm_contconv", "genv", "mine"]
    assert (data["license"], data["datasets"], data["base_model"]) == ("mit", ["digits"], "timm/x")
    assert data["metrics"] == ["accuracy"]
    assert card.data.eval_results == [result]
    assert "| Digits | accuracy | 98.5 | [me](https://x.org) |" in card.text
    assert "| GaussianEnvelopeConv2d 1×1 |" in card.text


def test_metadata_that_the_hub_refuses_is_refused_before_anything_is_uploaded(hub):
    with pytest.raises(ValueError, match="license"):
        tcc.push_to_hub(small(), REPO, license="My Own Licence!")
    assert asked(hub, "PUT") == []
    assert set(hub.repositories[REPO].files()) == {".gitattributes"}


def test_a_private_repository_needs_a_token(hub, monkeypatch):
    tcc.push_to_hub(small(), REPO, private=True)
    assert hub.repositories[REPO].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match="hf auth login"):
        tcc.from_pretrained(REPO)
    assert tcc.from_pretrained(REPO, token=READ_TOKEN).num_classes == 3


def test_private_is_not_published_to_a_public_repository(hub, published):
    before = dict(hub.repositories[REPO].refs)
    with pytest.raises(ValueError, match="private=True: me/model exists and is public"):
        tcc.push_to_hub(small(seed=1), REPO, private=True)
    assert hub.repositories[REPO].refs == before


def test_a_branch_is_made_and_pulled_by_name_and_by_commit(hub, published, x):
    new = small(seed=1)
    info = tcc.push_to_hub(new, REPO, revision="v2")
    assert_same_logits(new, tcc.from_pretrained(REPO, revision="v2"), x)
    assert_same_logits(new, tcc.from_pretrained(REPO, revision=info.oid), x)
    assert_same_logits(new, timm.create_model(f"hf-hub:{REPO}@v2", pretrained=True), x)
    assert_same_logits(published, tcc.from_pretrained(REPO), x)


def test_a_pull_request_leaves_main_alone(hub, published, x):
    new = small(seed=1)
    info = tcc.push_to_hub(new, REPO, create_pr=True)
    assert info.pr_url.endswith("/discussions/1")
    assert_same_logits(new, tcc.from_pretrained(REPO, revision="refs/pr/1"), x)
    assert_same_logits(published, tcc.from_pretrained(REPO), x)


def test_offline_from_the_cache(hub, published, x, monkeypatch):
    tcc.from_pretrained(REPO)
    hub.shutdown()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 does
    assert_same_logits(published, tcc.from_pretrained(REPO), x)
    assert_same_logits(published, timm.create_model(f"hf-hub:{REPO}", pretrained=True), x)
    with pytest.raises(LocalEntryNotFoundError, match="HF_HUB_OFFLINE is set"):
        tcc.from_pretrained("me/another")


def test_configuration_and_weights_are_of_one_commit(hub, published, x):
    """Somebody publishes between the two downloads."""
    repository = hub.repositories[REPO]

    def publish(request: Request) -> None:
        if request.path.endswith("model.safetensors"):
            repository.commit("main", {})

    hub.fault = publish
    assert_same_logits(published, tcc.from_pretrained(REPO), x)


# what was uploaded is what was verified


def test_logits_that_are_not_finite_are_not_published(hub):
    model = small()
    torch.nn.init.constant_(model.fc.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        tcc.push_to_hub(model, REPO)
    assert hub.requests == []


def test_a_model_that_does_not_load_back_the_same_is_not_published(hub):
    model = small()
    model.register_forward_hook(lambda module, inputs, output: 2 * output)  # no file holds this
    with pytest.raises(ValueError, match="gives other logits"):
        tcc.push_to_hub(model, REPO)
    assert hub.requests == []


def test_training_mode_and_frozen_norms_are_left_as_they_were(hub):
    model = small().train()
    model.bn1.eval()
    tcc.push_to_hub(model, REPO)
    assert model.training
    assert not model.bn1.training


# interruptions


@pytest.fixture
def two_revisions(hub, published):
    """A hub where `old` is published, and the files that publishing `new` gives."""
    new = tcc.patch(timm.create_model("test_resnet", num_classes=4), "genv", select="layer4.*", init="random")
    tcc.push_to_hub(new, "me/reference")
    expected = hub.repositories["me/reference"].files()
    return hub.repositories[REPO].files(), new, expected


def without_card(files):
    """The card names its repository."""
    return {path: content for path, content in files.items() if path != "README.md"}


def test_interrupted_at_every_request_it_is_the_old_revision_or_the_new(hub, two_revisions, no_waiting):
    old, new, expected = two_revisions
    repository, blobs = copy.deepcopy(hub.repositories[REPO]), dict(hub.blobs)
    hub.blobs = {oid: blob for oid, blob in blobs.items() if blob not in expected.values()}
    start = len(hub.requests)
    tcc.push_to_hub(new, REPO)
    whole = hub.requests[start:]
    assert len(whole) >= 8
    cases = [(n, "before") for n in range(len(whole))]
    cases += [(n, "after") for n, r in enumerate(whole) if r.method == "PUT" or "/commit/" in r.path]
    for number, drop in cases:
        hub.repositories[REPO] = copy.deepcopy(repository)
        hub.blobs = {oid: blob for oid, blob in blobs.items() if blob not in expected.values()}
        hub.go_away_at(number, drop)
        with pytest.raises(ConnectionError, match="run this again"):
            tcc.push_to_hub(new, REPO)
        files = hub.repositories[REPO].files()
        if (number, drop) == cases[-1]:  # only the answer to the commit was lost
            assert without_card(files) == without_card(expected)
        else:
            assert files == old, (number, drop)
        hub.fault = lambda request: None
        tcc.push_to_hub(new, REPO)
        assert without_card(hub.repositories[REPO].files()) == without_card(expected)


def test_a_first_publication_that_was_interrupted_leaves_an_empty_repository_and_finishes(hub, no_waiting):
    model = small()
    hub.fail_on("PUT", "/lfs/", Fault(drop="before"))
    with pytest.raises(ConnectionError, match="there as a whole or not at all"):
        tcc.push_to_hub(model, REPO)
    assert set(hub.repositories[REPO].files()) == {".gitattributes"}
    hub.fault = lambda request: None
    tcc.push_to_hub(model, REPO)
    assert set(hub.repositories[REPO].files()) == {*FILES, ".gitattributes"}


def test_a_commit_by_somebody_else_meanwhile_is_not_mixed_with_ours(hub, published):
    repository = hub.repositories[REPO]
    theirs = {**repository.commits[repository.refs["main"]]}
    theirs.pop("config.json")

    def commit_theirs(request: Request) -> None:
        if "/commit/" in request.path:
            repository.commit("main", theirs)

    hub.fault = commit_theirs
    with pytest.raises(HfHubHTTPError, match="Somebody else changed the repository"):
        tcc.push_to_hub(small(seed=1), REPO)
    assert set(repository.files()) == set(theirs)


# what the Hub may answer

ADVICE = {
    401: "hf auth login",
    403: "create one with write access",
    404: "Check the names of the repository and the revision",
    409: "wait a moment and run this again",
    429: "wait some minutes and run this again",
    500: "status.huggingface.co",
}


@pytest.mark.parametrize("status", ADVICE)
@pytest.mark.parametrize("path", ["/preupload/", "/commit/"])
def test_errors_of_publishing_say_what_to_do(hub, published, no_waiting, status, path):
    refs = dict(hub.repositories[REPO].refs)
    hub.fail_on("POST", path, Fault(status))
    with pytest.raises(HfHubHTTPError, match=re.escape(ADVICE[status])) as raised:
        tcc.push_to_hub(small(seed=1), REPO)
    assert REPO in str(raised.value)
    assert hub.repositories[REPO].refs == refs


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_errors_of_creating_say_what_to_do(hub, no_waiting, status):
    hub.fail_on("POST", "/repos/create", Fault(status))
    with pytest.raises(HfHubHTTPError, match=f"nothing was published. .*{re.escape(ADVICE[status])}"):
        tcc.push_to_hub(small(), REPO)


@pytest.mark.parametrize("status", ADVICE)
def test_errors_of_pulling_say_what_to_do(hub, published, no_waiting, status):
    hub.fail_on("HEAD", "config.json", Fault(status))
    with pytest.raises(OSError, match=re.escape(ADVICE[status])):
        tcc.from_pretrained(REPO)


@pytest.mark.parametrize(("status", "tries"), [(429, 6), (500, 6), (403, 1)])
def test_uploads_are_retried_where_the_client_retries(hub, no_waiting, status, tries):
    hub.fail_on("POST", "objects/batch", Fault(status))
    with pytest.raises(HfHubHTTPError):
        tcc.push_to_hub(small(), REPO)
    assert len(asked(hub, "POST", "objects/batch")) == tries


def test_trouble_that_passes_is_not_noticed(hub, no_waiting, x):
    model = small()
    hub.fail_on("PUT", "/lfs/", Fault(500), times=4)
    tcc.push_to_hub(model, REPO)
    assert_same_logits(model, tcc.from_pretrained(REPO), x)


def test_who_may_not_write_is_told_so(hub, monkeypatch):
    with pytest.raises(HfHubHTTPError, match="create one with write access"):
        tcc.push_to_hub(small(), REPO, token=READ_TOKEN)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="hf auth login"):
        tcc.push_to_hub(small(), REPO)
    assert hub.repositories == {}


def test_names_that_are_not_there(hub, published):
    with pytest.raises(RepositoryNotFoundError, match="Check the names of the repository and the revision"):
        tcc.from_pretrained("me/nothing")
    with pytest.raises(RevisionNotFoundError, match="Check the names"):
        tcc.from_pretrained(REPO, revision="v9")
    with pytest.raises(ValueError, match="Repo id"):
        tcc.push_to_hub(published, "a/b/c")
    with pytest.raises(ValueError, match="is a folder, which has no revisions"):
        tcc.from_pretrained("/tmp", revision="v9")


def test_an_answer_that_is_no_hubs_is_named(hub, monkeypatch, no_waiting):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConnectionError, match="nothing was published.*HF_ENDPOINT"):
        tcc.push_to_hub(small(), REPO)
    with pytest.raises(OSError, match="HF_ENDPOINT"):
        tcc.from_pretrained(REPO)


# tokens


@pytest.mark.parametrize("given", ["argument", "environment"])
@pytest.mark.parametrize("status", [None, 403, 500])
def test_no_token_in_logs_errors_or_files(hub, tmp_path, monkeypatch, caplog, capfd, no_waiting, given, status):
    """With everything logged that can be."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.DEBUG)
    monkeypatch.setattr(huggingface_hub.constants, "HF_DEBUG", True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    token = WRITE_TOKEN if given == "argument" else None
    if given == "argument":
        monkeypatch.delenv("HF_TOKEN")
    error = ""
    if status is not None:
        hub.fail_on("POST", "/commit/", Fault(status))
    try:
        tcc.push_to_hub(small(), REPO, token=token)
        tcc.from_pretrained(REPO, token=token)
    except HfHubHTTPError as raised:
        error = "".join(traceback.format_exception(raised))
    assert bool(error) == (status is not None)
    captured = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "authorization" in caplog.text
    assert WRITE_TOKEN not in error + caplog.text + captured.out + captured.err
    assert WRITE_TOKEN.encode() not in written + b"".join(hub.repositories[REPO].files().values())


@pytest.mark.parametrize("where", ["/repos/create", "/preupload/", "objects/batch", "/commit/"])
def test_a_token_that_the_server_repeats_is_not_in_the_error(hub, where):
    hub.fail_on("POST", where, Fault(403, f"refused: Authorization: Bearer {WRITE_TOKEN}"))
    with pytest.raises(HfHubHTTPError, match="Bearer <token>") as raised:
        tcc.push_to_hub(small(), REPO)
    text = "".join(traceback.format_exception(raised.value)) + repr(raised.value.args) + raised.value.server_message
    assert WRITE_TOKEN not in text


# damaged downloads


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[-100] ^= 0x10
    return bytes(changed)


LOADERS = {
    "from_pretrained": tcc.from_pretrained,
    "create_model": lambda name: timm.create_model(f"hf-hub:{name}", pretrained=True),
}


@pytest.mark.parametrize("load", LOADERS)
def test_a_bit_that_flipped_in_the_weights_is_refused_and_not_kept(hub, published, x, load):
    hub.fail_on("GET", "/cdn/", Fault(change=flip))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        LOADERS[load](REPO)
    hub.fault = lambda request: None
    assert_same_logits(published, LOADERS[load](REPO), x)


def test_a_bit_that_flipped_in_the_configuration_is_refused(hub, published):
    hub.fail_on("GET", "config.json", Fault(change=flip))
    with pytest.raises(ValueError, match="config.json is damaged"):
        tcc.from_pretrained(REPO)


def test_a_bit_that_flipped_in_the_cache_is_refused(hub, published, x, tmp_path):
    tcc.from_pretrained(REPO)
    (weights,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    weights.resolve().write_bytes(flip(weights.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        tcc.from_pretrained(REPO)
    assert_same_logits(published, tcc.from_pretrained(REPO), x)


@pytest.mark.parametrize("load", LOADERS)
def test_a_download_that_is_too_short_is_refused(hub, published, load):
    hub.fail_on("GET", "/cdn/", Fault(change=lambda content: content[: len(content) // 2]))
    with pytest.raises(OSError, match="Consistency check failed"):
        LOADERS[load](REPO)


def test_a_download_that_broke_off_is_resumed(hub, published, x, no_waiting):
    hub.fail_on("GET", "/cdn/", Fault(change=lambda content: content[: len(content) // 2], keep_length=True), times=1)
    assert_same_logits(published, tcc.from_pretrained(REPO), x)
    assert len(asked(hub, "GET", "/cdn/")) == 2


# pickles


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.pth", "model.pth"])
@pytest.mark.parametrize("load", LOADERS)
def test_a_pickle_is_not_loaded_from_a_repository(hub, published, tmp_path, load, name):
    repository = hub.repositories[REPO]
    files = dict(repository.commits[repository.refs["main"]])
    files.pop("model.safetensors")
    files[name] = Entry(pickle.dumps(Bomb(tmp_path / "bang")), True)
    repository.commit("main", files)
    with pytest.raises((EntryNotFoundError, FileNotFoundError), match="model.safetensors"):
        LOADERS[load](REPO)
    assert not (tmp_path / "bang").exists()
    assert asked(hub, "GET", "/cdn/") == []
