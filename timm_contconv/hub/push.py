"""Publishing a model on the Hugging Face Hub: verified before it leaves the machine, in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, EvalResult, HfApi
from huggingface_hub.utils import validate_repo_id
from timm.models import get_model_input_config
from torch import nn

from ..patching.originals import in_eval_mode
from .card import write_card
from .download import explain_errors
from .load import from_pretrained
from .save import write_folder

__all__ = ["push_to_hub"]


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    eval_results: Sequence[EvalResult] = (),
    text: str = "",
) -> CommitInfo:
    """Publish a patched timm model on the Hugging Face Hub, in one commit.

    The files are written to a temporary folder and loaded back; parameters and logits are compared with the model's
    before anything is sent. A repository that is not there is created. Interrupted at any point, the repository
    holds the old revision or the new one; running it again finishes, and sends no file twice.

    Afterwards `timm.create_model("hf-hub:REPO_ID", pretrained=True)` and `tcc.from_pretrained(REPO_ID)` load it.

    Args:
        model: a named model or a timm model patched by hand.
        repo_id: "user/name".
        private: of a repository that is created; one that exists and is public is refused.
        revision: branch to commit to, created from "main" if it is not there; "main" if None.
        create_pr: propose the commit as a pull request instead.
        token: with write access; None for the one of `hf auth login` or HF_TOKEN.
        tags: of the model card, beside timm, timm_contconv and the method's name.
        license: identifier that the Hub knows, as "apache-2.0"; None to say nothing.
        datasets: identifiers of the data that it was trained on.
        base_model: identifier of the model that it was trained from.
        eval_results: measurements for the card, by huggingface_hub's `EvalResult`.
        text: a paragraph for the card.

    Returns:
        huggingface_hub's `CommitInfo`: `oid`, `commit_url`, `pr_url`.

    Raises:
        ValueError: repo_id is none, the model can't be saved or does not load back the same, the metadata is not
            valid, or the repository is public where a private one was asked for.
        TypeError: repo_id is not a text.
        HfHubHTTPError, ConnectionError: the Hub said no, or did not answer; the message says what to do.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id={repo_id!r}: expected a text, as 'user/name'")
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="timm_contconv.") as temporary:
        folder = Path(temporary)
        write_folder(model, folder)
        write_card(
            model, folder, repo_id, f"hf-hub:{repo_id}", tags=tags, license=license, datasets=datasets,
            base_model=base_model, eval_results=eval_results, text=text,
        )  # fmt: skip
        _verify(folder, model)
        return _upload(folder, repo_id, private, revision, create_pr, token)


def _upload(
    folder: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, token: str | None
) -> CommitInfo:
    api = HfApi(token=token, library_name="timm", library_version=timm.__version__)
    with explain_errors(f"{repo_id}: nothing was published", token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"private=True: {repo_id} exists and is public; make it private in its settings, or choose another name"
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        parent = api.model_info(repo_id, revision=revision).sha
    files = sorted(path for path in folder.iterdir() if path.is_file())
    what = f"{repo_id}: the commit was not confirmed; it is there as a whole or not at all"
    with explain_errors(what, token):
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path.name, path) for path in files],
            commit_message="Add model",
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )


@torch.no_grad()
def _verify(folder: Path, model: nn.Module) -> None:
    """Load a folder back and compare parameters, buffers and logits with the model's.

    Raises:
        ValueError: something differs, or the model's logits are not finite.
    """
    parameter = next(model.parameters())
    size = get_model_input_config(model)["input_size"]
    images = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)
    with in_eval_mode(model):
        expected = model(images).float()
    if not expected.isfinite().all():
        raise ValueError("model: its logits are not finite for an ordinary image; train it again before publishing")
    loaded = from_pretrained(folder)
    values = loaded.state_dict()
    for key, value in model.state_dict().items():
        if not torch.equal(values[key].cpu(), value.cpu().to(values[key].dtype)):
            raise ValueError(f"{key}: what was loaded back is not what the model holds; its dtype is {value.dtype}")
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, value in (*loaded.named_parameters(), *loaded.named_buffers()):
        value.data = value.data.to(ours[key].device, ours[key].dtype)
    actual = loaded.eval()(images).float()
    tolerance = torch.finfo(parameter.dtype).eps ** 0.5
    if (actual - expected).abs().max() > tolerance * expected.abs().max():
        raise ValueError(
            "model: loaded back from its files it gives other logits, so that it holds something that they do not: a"
            " hook, or an attribute that was changed by hand"
        )
