"""A Hugging Face Hub on the loopback interface: what huggingface_hub's client asks of the real one, in memory.

It has the routes to create, upload to, download from and inspect a model repository over plain HTTP (Git LFS for large
files, in one part). Xet storage is not there: the client must run with HF_HUB_DISABLE_XET=1. A function that sees every
request before it is served injects faults.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

__all__ = ["READ_TOKEN", "WRITE_TOKEN", "Fault", "HubServer", "Request", "running_hub", "use_hub"]

WRITE_TOKEN = "hf_writeTokenThatNobodyMaySee"
READ_TOKEN = "hf_readTokenThatNobodyMaySee"
Files = dict[str, bytes]
#: status, headers, body
Answer = tuple[int, dict[str, str], bytes]


class Request(NamedTuple):
    """One request: its number from 0, method, and path without query."""

    number: int
    method: str
    path: str


class Fault(NamedTuple):
    """What goes wrong with a request.

    Attributes:
        status: answer with this instead of serving the request.
        message: the error's text.
        drop: close the connection: "before" the request is served, or "after", so that only the answer is lost.
        change: change the bytes of a file that is downloaded.
    """

    status: int | None = None
    message: str = "injected"
    drop: str | None = None
    change: Callable[[bytes], bytes] = bytes


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file in large file storage."""
    return path.endswith((".safetensors", ".bin", ".png"))


def oid(path: str, content: bytes) -> str:
    """The Hub's hash: SHA-256 of a large file, Git's blob hash of another."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits by hash, and what branches and pull requests point at."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Files) -> str:
        self.refs[ref] = sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.refs.get(revision, revision)]


class HubError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **body: str) -> None:
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}


class HubServer(ThreadingHTTPServer):
    """The Hub. `repositories`, `blobs` and `requests` may be read and changed by a test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files are: another host, as with the real Hub, so that the client keeps its token to itself."""
        return f"http://localhost:{self.server_address[1]}/cdn"

    def asked(self, method: str, path: str = "") -> list[Request]:
        """The requests so far whose path matches a regular expression."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def go_away_at(self, number: int, drop: str) -> None:
        """Be gone from one request on, counted from 0 from now on; that one is dropped as `Fault.drop` says."""
        first = len(self.requests) + number
        self.fault = lambda request: (
            None if request.number < first else Fault(drop=drop if request.number == first else "before")
        )

    def fail_on(self, method: str, path: str, fault: Fault) -> None:
        """Inject a fault into requests whose path matches a regular expression."""
        self.fault = lambda request: fault if request.method == method and re.search(path, request.path) else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent about connections that a fault closed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `requests` instead."""

    def do_GET(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        if url.path == "/api/agent-harnesses":  # asked once a day; no test is about it
            self._answer(404, {}, b"")
            return
        with self.server.lock:
            request = Request(len(self.server.requests), self.command, unquote(url.path))
            self.server.requests.append(request)
            self.fault = self.server.fault(request) or Fault()
            self.close_connection = self.fault.drop is not None
            if self.fault.drop == "before":
                return
            try:
                if self.fault.status is not None:
                    raise HubError(self.fault.status, self.fault.message)
                answer = self._route(url.path, {k: v[0] for k, v in parse_qs(url.query).items()}, body)
            except HubError as error:
                answer = (error.status, error.headers, json.dumps(error.body).encode())
        if self.fault.drop != "after":
            self._answer(*answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return getattr(self, name)(query, body, *map(unquote, match.groups()))
        raise HubError(404, f"no such route: {self.command} {path}")

    # who asks

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _require_write(self) -> None:
        if self._token() is None:
            raise HubError(401, "Invalid username or password.")
        if self._token() != WRITE_TOKEN:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")

    def _repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self._token() is None):
            raise HubError(401 if self._token() is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def whoami(self, query: dict[str, str], body: bytes) -> Answer:
        if self._token() is None:
            raise HubError(401, "Invalid username or password.")
        return _ok({"name": "me", "type": "user", "orgs": []})

    # repositories

    def create(self, query: dict[str, str], body: bytes) -> Answer:
        self._require_write()
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        repository = self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return _ok({"url": url})

    def branch(self, query: dict[str, str], body: bytes, name: str, branch: str) -> Answer:
        self._require_write()
        refs = self._repository(name).refs
        refs.setdefault(branch, refs["main"])
        return _ok({})

    def info(self, query: dict[str, str], body: bytes, name: str, revision: str = "main") -> Answer:
        repository = self._repository(name)
        sha = self._commit_of(repository, revision)
        return _ok({"_id": "0", "id": name, "sha": sha, "private": repository.private, "siblings": []})

    # uploading

    def validate_yaml(self, query: dict[str, str], body: bytes) -> Answer:
        return _ok({"errors": [], "warnings": []})

    def preupload(self, query: dict[str, str], body: bytes, name: str, revision: str) -> Answer:
        self._require_write()
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if is_large(path) else "regular" for path in paths}
        return _ok({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})

    def lfs_batch(self, query: dict[str, str], body: bytes, name: str) -> Answer:
        self._require_write()
        wanted = json.loads(body)["objects"]
        for item in wanted:
            if item["oid"] not in self.server.blobs:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}}}
        return _ok({"transfer": "basic", "objects": wanted})

    def lfs_put(self, query: dict[str, str], body: bytes, sha: str) -> Answer:
        assert hashlib.sha256(body).hexdigest() == sha
        self.server.blobs[sha] = body
        return _ok({})

    def commit(self, query: dict[str, str], body: bytes, name: str, revision: str) -> Answer:
        self._require_write()
        repository = self._repository(name)
        parent = self._commit_of(repository, revision)
        header, *values = (json.loads(line)["value"] for line in body.splitlines())
        if header["parentCommit"] != parent:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for value in values:
            files[value["path"]] = (
                self.server.blobs[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
            )
        wanted = query.get("create_pr") == "1"
        sha = repository.commit("refs/pr/1" if wanted else revision, files)
        request = {"pullRequestUrl": f"{self.server.url}/{name}/discussions/1"} if wanted else {}
        return _ok({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, **request})

    # downloading

    def resolve(self, query: dict[str, str], body: bytes, name: str, revision: str, path: str) -> Answer:
        repository = self._repository(name)
        sha = self._commit_of(repository, revision)
        if path not in repository.commits[sha]:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = repository.commits[sha][path]
        digest = oid(path, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest}"'}
        if not is_large(path):
            return 200, headers, self.fault.change(content)
        self.server.blobs[digest] = content
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return 302, {**headers, **linked, "Location": f"{self.server.storage_url}/{digest}"}, b""

    def cdn(self, query: dict[str, str], body: bytes, sha: str) -> Answer:
        assert "Authorization" not in self.headers  # it is another host
        return 200, {"ETag": '"of the storage, not of the file"'}, self.fault.change(self.server.blobs[sha])


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", "branch"),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", "commit"),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", "info"),
    ("GET", rf"/api/models/{REPO}", "info"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(\w+)", "lfs_put"),
    ("GET|HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET|HEAD", r"/cdn/(\w+)", "cdn"),
]


def _ok(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextlib.contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server on a port of its own, until the block ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, home: Any, token: str | None = WRITE_TOKEN) -> None:
    """Point the client at a server, as HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_DISABLE_XET do at its import."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(variable, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
