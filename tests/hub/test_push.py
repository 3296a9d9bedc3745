"""Publishing, with huggingface_hub's own client against a server on the loopback interface."""

import copy
import logging
import traceback

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HfHubHTTPError

import timm_contconv as tcc

from ..helpers import slow_but
from .helpers import PULLERS, assert_same_logits, small
from .server import READ_TOKEN, WRITE_TOKEN, Fault

REPO = "me/model"
FILES = {".gitattributes", "README.md", "config.json", "kernels.png", "model.safetensors"}


@pytest.mark.parametrize("pull", PULLERS)
def test_a_model_goes_in_one_commit_after_one_upload_of_each_large_file(hub, x, pull):
    model = small().train()
    model.bn1.eval()
    info = tcc.push_to_hub(model, REPO)
    assert model.training
    assert not model.bn1.training
    repository = hub.repositories[REPO]
    assert set(repository.files()) == FILES
    assert len(repository.commits) == 2  # that of the repository's creation, and ours
    assert repository.refs["main"] == info.oid
    assert len(hub.asked("PUT")) == 2
    assert hub.asked("POST", "/commit/")[0].number == len(hub.requests) - 1
    assert_same_logits(model, PULLERS[pull](REPO), x)


def test_the_card_carries_what_was_given_and_its_usage_block_runs(hub, x):
    model = small()
    source = {"source_name": "me", "source_url": "https://x.org"}
    result = EvalResult("image-classification", "digits", "Digits", "accuracy", 98.5, **source)
    facts = {"license": "mit", "datasets": ["digits"], "base_model": "timm/x"}
    tcc.push_to_hub(model, REPO, tags=["mine"], eval_results=[result], **facts)
    card = ModelCard(hub.repositories[REPO].files()["README.md"].decode())
    data = card.data.to_dict()
    assert {key: data[key] for key in facts} == facts
    assert data["tags"] == ["timm", "timm_contconv", "genv", "mine"]
    assert card.data.eval_results == [result]
    assert "| Digits | accuracy | 98.5 | [me](https://x.org) |" in card.text
    assert "| GaussianEnvelopeConv2d 1×1 |" in card.text
    names = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert_same_logits(model, names["model"], x)


def test_a_branch_is_made_and_a_pull_request_leaves_main_alone(hub, x):
    old, new = small(), small(seed=1)
    tcc.push_to_hub(old, REPO)
    info = tcc.push_to_hub(new, REPO, revision="v2")
    tcc.push_to_hub(new, REPO, create_pr=True)
    for revision in ("v2", info.oid, "refs/pr/1"):
        assert_same_logits(new, tcc.from_pretrained(REPO, revision=revision), x)
    assert_same_logits(new, timm.create_model(f"hf-hub:{REPO}@v2", pretrained=True), x)
    assert_same_logits(old, tcc.from_pretrained(REPO), x)


def test_private_is_not_published_to_a_public_repository(hub):
    tcc.push_to_hub(small(), REPO)
    before = dict(hub.repositories[REPO].refs)
    with pytest.raises(ValueError, match="private=True: me/model exists and is public"):
        tcc.push_to_hub(small(seed=1), REPO, private=True)
    assert hub.repositories[REPO].refs == before


# what is uploaded is what was verified


def with_nan(model):
    torch.nn.init.constant_(model.fc.weight, float("nan"))


def with_a_hook(model):
    model.register_forward_hook(lambda module, inputs, output: 2 * output)  # no file holds this


@pytest.mark.parametrize(("edit", "message"), [(with_nan, "not finite"), (with_a_hook, "gives other logits")])
def test_a_model_that_does_not_load_back_the_same_is_not_published(hub, edit, message):
    model = small()
    edit(model)
    with pytest.raises(ValueError, match=message):
        tcc.push_to_hub(model, REPO)
    assert hub.requests == []


# interruptions

#: requests of a publication over an old one, lost before or after they are served
MOMENTS = [("/repos/create", "before"), ("/preupload/", "before"), ("objects/batch", "before"), ("/lfs/", "before"),
           ("/lfs/", "after"), ("/commit/", "before"), ("/commit/", "after")]  # fmt: skip


@pytest.mark.parametrize(("path", "drop"), slow_but(MOMENTS, *MOMENTS[-2:]))
def test_interrupted_it_is_the_old_revision_or_the_new_and_the_next_try_finishes(hub, no_waiting, x, path, drop):
    old, new = small(), small(seed=1, num_classes=4)
    tcc.push_to_hub(old, REPO)
    before, blobs = copy.deepcopy(hub.repositories[REPO]), dict(hub.blobs)
    start = len(hub.requests)
    tcc.push_to_hub(new, REPO)
    number = next(r.number for r in hub.requests[start:] if path in r.path) - start
    hub.repositories[REPO], hub.blobs = copy.deepcopy(before), blobs
    hub.go_away_at(number, drop)
    with pytest.raises(ConnectionError, match="run this again"):
        tcc.push_to_hub(new, REPO)
    hub.fault = lambda request: None
    committed = (path, drop) == ("/commit/", "after")  # only the answer was lost
    assert_same_logits(new if committed else old, tcc.from_pretrained(REPO), x)
    assert committed or hub.repositories[REPO].files() == before.files()
    tcc.push_to_hub(new, REPO)
    assert_same_logits(new, tcc.from_pretrained(REPO), x)
    assert set(hub.repositories[REPO].files()) == FILES


def test_a_commit_by_somebody_else_meanwhile_is_not_mixed_with_ours(hub):
    tcc.push_to_hub(small(), REPO)
    repository = hub.repositories[REPO]
    hub.fault = lambda request: repository.commit("main", {}) and None if "/commit/" in request.path else None
    with pytest.raises(HfHubHTTPError, match="Somebody else changed the repository"):
        tcc.push_to_hub(small(seed=1), REPO)
    assert repository.files() == {}


# errors and tokens

ADVICE = {
    401: "hf auth login",
    403: "create one with write access",
    404: "Check the names of the repository and the revision",
    409: "wait a moment and run this again",
    429: "wait some minutes and run this again",
    500: "status.huggingface.co",
}


@pytest.mark.parametrize("status", slow_but(ADVICE, 401, 429))
def test_errors_say_what_to_do_and_do_not_repeat_the_token(hub, no_waiting, status):
    hub.fail_on("POST", "/commit/", Fault(status, f"refused: Authorization: Bearer {WRITE_TOKEN}"))
    with pytest.raises(HfHubHTTPError, match=f"{REPO}: the commit was not confirmed") as raised:
        tcc.push_to_hub(small(), REPO)
    assert ADVICE[status] in str(raised.value)
    text = "".join(traceback.format_exception(raised.value)) + repr(raised.value.args)
    assert "Bearer <token>" in text
    assert WRITE_TOKEN not in text + raised.value.server_message
    assert set(hub.repositories[REPO].files()) == {".gitattributes"}


def test_who_may_not_write_is_told_so(hub, monkeypatch):
    with pytest.raises(HfHubHTTPError, match="nothing was published. .*create one with write access"):
        tcc.push_to_hub(small(), REPO, token=READ_TOKEN)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="hf auth login"):
        tcc.push_to_hub(small(), REPO)
    assert hub.repositories == {}


def test_no_token_in_logs_or_files(hub, tmp_path, monkeypatch, caplog, capfd):
    """With everything logged that can be."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.DEBUG)
    monkeypatch.setattr(huggingface_hub.constants, "HF_DEBUG", True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    tcc.push_to_hub(small(), REPO, token=WRITE_TOKEN)
    tcc.from_pretrained(REPO, token=WRITE_TOKEN)
    captured = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "authorization" in caplog.text
    assert WRITE_TOKEN not in caplog.text + captured.out + captured.err
    assert WRITE_TOKEN.encode() not in written + b"".join(hub.repositories[REPO].files().values())
