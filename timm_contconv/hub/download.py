"""Files from the Hub, compared with the Hub's hash before they are used; and what to do when the Hub says no."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

__all__ = ["download", "explain_errors"]

ADVICE = {
    400: "The Hub did not accept what was sent.",
    401: "You are not logged in, or the token is not valid: run `hf auth login`, set HF_TOKEN, or pass token=...",
    403: "The token may not do this: create one with write access to this repository at"
    " https://huggingface.co/settings/tokens, or use a repository of your own.",
    404: "Check the names of the repository and the revision; a private repository is also 'not found' without a"
    " token that may see it.",
    409: "Another operation on the repository is in progress: wait a moment and run this again.",
    412: "Somebody else changed the repository meanwhile: look at the change, then run this again.",
    429: "Too many requests: wait some minutes and run this again.",
}
SERVER_TROUBLE = "The Hub has trouble of its own, see https://status.huggingface.co: run this again later."
NO_ANSWER = "check the network and, if it is set, HF_ENDPOINT, then run this again"


def download(
    repo_id: str,
    filename: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A file of a repository, in the Hub's cache, whose content has the hash that the Hub announced.

    The client compares sizes; a bit that flipped it does not see. Without network the cached file is taken.

    Args:
        repo_id: "user/name".
        filename: path in the repository.
        revision: branch, tag or commit; "main" if None.
        token: as huggingface_hub takes it.
        cache_dir: instead of the Hub's cache.

    Raises:
        HfHubHTTPError, OSError: the Hub said no, or did not answer; the message says what to do.
        ValueError: the content is damaged; it was removed from the cache.
    """
    with explain_errors(f"{repo_id}: {filename} was not downloaded", token):
        path = Path(hf_hub_download(repo_id, filename, revision=revision, token=token, cache_dir=cache_dir))
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""  # the cache names a file after its hash
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):  # a file system without symbolic links
        with explain_errors(f"{repo_id}: the hash of {filename} was not found", token):
            expected = get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), token=token).etag or ""
    actual = _hash(path, expected)
    if actual != expected:
        for link in (path.resolve(), path.parent / os.readlink(path) if path.is_symlink() else path, path):
            link.unlink(missing_ok=True)
        raise ValueError(
            f"{repo_id}: {filename} is damaged: its hash is {actual}, the Hub's {expected}; it was removed from the"
            " cache: run this again"
        )
    return path


@contextlib.contextmanager
def explain_errors(what: str, token: str | bool | None) -> Iterator[None]:
    """Add to the client's errors what failed and what to do; keep tokens out of them.

    Args:
        what: one clause, as "me/model: nothing was changed".
        token: the token that is in use.
    """
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise LocalEntryNotFoundError(_clean(f"{what}. {error} {_advice(error.__cause__)}", token)) from None
    except HfHubHTTPError as error:
        raise _explained(error, what, token) from None
    except LocalTokenNotFoundError as error:
        raise ConnectionError(f"{what}. {ADVICE[401]}") from error
    except (RuntimeError, HTTPError, OfflineModeIsEnabled, json.JSONDecodeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError):  # the client wraps those of uploads
            raise _explained(cause, what, token) from None
        if not isinstance(cause, HTTPError | OfflineModeIsEnabled | json.JSONDecodeError):
            raise
        raise ConnectionError(_clean(f"{what}. {_advice(cause)} ({cause})", token)) from None


def _advice(error: BaseException | None) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that only what is in the cache can be had: unset it"
    if not isinstance(error, HfHubHTTPError):
        return f"The Hub did not answer as it should: {NO_ANSWER}"
    status = error.response.status_code
    return ADVICE.get(status, SERVER_TROUBLE if status >= 500 else f"The Hub answered {status}.")


def _explained(error: HfHubHTTPError, what: str, token: str | bool | None) -> HfHubHTTPError:
    """The same error, with what failed ahead of the client's words and advice after them."""
    error.args = (_clean(f"{what}. {_advice(error)}\n{error.args[0]}", token), *error.args[1:])
    error.server_message = None if error.server_message is None else _clean(error.server_message, token)
    return error


def _clean(text: str, token: str | bool | None) -> str:
    """Without tokens: a proxy may repeat the request in its error page."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "<token>")
    return text


def _hash(path: Path, like: str) -> str:
    """SHA-256 of a large file; of another, Git's hash, told apart by the length of `like`."""
    if len(like) == 64:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
