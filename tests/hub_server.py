"""A Hugging Face Hub on the loopback interface: what huggingface_hub's client asks of the real one, in memory.

Spoken are the routes that creating, uploading, downloading and inspecting a model repository take over plain HTTP
(Git LFS for large files); Xet storage is not, so the client must run with HF_HUB_DISABLE_XET=1 or without hf_xet.
Faults are injected by a function that sees every request before it is served.
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
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml

__all__ = ["Entry", "Fault", "HubServer", "Request", "running_hub", "use_hub"]

WRITE_TOKEN = "hf_writeTokenThatNobodyMaySee"
READ_TOKEN = "hf_readTokenThatNobodyMaySee"
#: suffixes that the Hub keeps in large file storage
LARGE = (".safetensors", ".bin", ".png", ".pth")
#: status, headers, body
Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Request:
    """One request: its number from 0, method, path without query, and body."""

    number: int
    method: str
    path: str
    body: bytes = b""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request.

    Attributes:
        status: answer with this instead of serving the request.
        message: the error's text.
        headers: sent with the error.
        drop: close the connection: "before" the request is served, or "after", so that only the answer is lost.
        change: change the bytes of a file that is downloaded.
        keep_length: announce the length that the file had before `change`.
    """

    status: int | None = None
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None
    change: Callable[[bytes], bytes] | None = None
    keep_length: bool = False


@dataclass
class Entry:
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The Hub's hash: SHA-256 of a large file, Git's blob hash of another."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits by hash, and what branches and pull requests point at."""

    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Entry]) -> str:
        text = json.dumps([len(self.commits), sorted((k, v.oid) for k, v in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        sha = self.resolve(revision)
        assert sha is not None
        return {path: entry.content for path, entry in self.commits[sha].items()}


class HubError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message.replace("\n", " "), **({"X-Error-Code": code} if code else {})}


class HubServer(ThreadingHTTPServer):
    """The Hub. `repositories`, `blobs` and `requests` may be read and changed by a test."""

    daemon_threads = True

    def __init__(self, part_size: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.part_size = part_size
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files are: another host, as with the real Hub, so that the client keeps its token to itself."""
        return f"http://localhost:{self.server_address[1]}/cdn"

    def go_away_at(self, number: int, drop: str) -> None:
        """Be gone from one request on, counted from 0 from now on; that one is dropped as `Fault.drop` says."""
        first = len(self.requests) + number
        self.fault = lambda request: (
            None if request.number < first else Fault(drop=drop if request.number == first else "before")
        )

    def fail_on(self, method: str, path: str, fault: Fault, times: int = 10**9) -> None:
        """Inject a fault into requests whose path matches a regular expression."""
        left = [times]

        def choose(request: Request) -> Fault | None:
            if request.method != method or not re.search(path, request.path) or left[0] == 0:
                return None
            left[0] -= 1
            return fault

        self.fault = choose

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent about connections that a fault closed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `requests` instead."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        if url.path == "/api/agent-harnesses":  # asked once a day, of no account
            self._answer(404, {}, b"")
            return
        with self.server.lock:
            request = Request(len(self.server.requests), self.command, unquote(url.path), body)
            self.server.requests.append(request)
            self.injected = self.server.fault(request) or Fault()
            if self.injected.drop == "before":
                self.close_connection = True
                return
            try:
                if self.injected.status is not None:
                    raise HubError(self.injected.status, self.injected.message)
                answer = self._route(url.path, {k: v[0] for k, v in parse_qs(url.query).items()}, body)
            except HubError as error:
                answer = (error.status, {**error.headers, **self.injected.headers}, _json(error.body))
            if self.injected.drop == "after":
                self.close_connection = True
                return
        self._answer(*answer)

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
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if int(headers.get("Content-Length", len(body))) != len(body):
            self.close_connection = True

    def _route(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return getattr(self, name)(*map(unquote, match.groups()), query=query, body=body)
        raise HubError(404, f"no such route: {self.command} {path}")

    # who asks

    def _token(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in (WRITE_TOKEN, READ_TOKEN):
            raise HubError(401, "Invalid credentials in Authorization header")
        return token

    def _require_write(self) -> None:
        token = self._token()
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if token != WRITE_TOKEN:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")

    def _repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self._token() is None):
            raise HubError(401 if self._token() is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def whoami(self, *, query: dict[str, str], body: bytes) -> Answer:
        if self._token() is None:
            raise HubError(401, "Invalid username or password.")
        return _ok({"name": "me", "type": "user", "orgs": []})

    # repositories

    def create(self, *, query: dict[str, str], body: bytes) -> Answer:
        self._require_write()
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        repository = self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)})
        return _ok({"url": url})

    def branch(self, name: str, branch: str, *, query: dict[str, str], body: bytes) -> Answer:
        self._require_write()
        repository = self._repository(name)
        if branch in repository.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        repository.refs[branch] = self._commit_of(repository, json.loads(body).get("startingPoint", "main"))
        return _ok({})

    def info(self, name: str, revision: str = "main", *, query: dict[str, str], body: bytes) -> Answer:
        repository = self._repository(name)
        sha = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        private = repository.private
        return _ok({"_id": "0", "id": name, "modelId": name, "sha": sha, "private": private, "siblings": siblings})

    def refs(self, name: str, *, query: dict[str, str], body: bytes) -> Answer:
        repository = self._repository(name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in repository.refs.items()
        ]
        return _ok({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    # uploading

    def validate_yaml(self, *, query: dict[str, str], body: bytes) -> Answer:
        errors = _metadata_errors(json.loads(body)["content"])
        if errors:
            raise HubError(400, "Invalid metadata", errors=[{"message": e} for e in errors], warnings=[])
        return _ok({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Answer:
        self._require_write()
        repository = self._repository(name)
        entries = repository.commits[self._commit_of(repository, revision)]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": entries[file["path"]].oid if file["path"] in entries else None,
            }
            for file in json.loads(body)["files"]
        ]
        return _ok({"files": files})

    def lfs_batch(self, name: str, *, query: dict[str, str], body: bytes) -> Answer:
        self._require_write()
        self._repository(name)
        objects = [self._lfs_actions(wanted["oid"], wanted["size"]) for wanted in json.loads(body)["objects"]]
        return _ok({"transfer": "basic", "objects": objects})

    def _lfs_actions(self, oid: str, size: int) -> dict[str, Any]:
        if oid in self.server.blobs:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.server.url}/lfs/{oid}", "header": {}}
        part = self.server.part_size
        if part is not None and size > part:
            numbers = range(1, -(-size // part) + 1)
            upload["header"] = {str(n): f"{self.server.url}/lfs/{oid}/{n}" for n in numbers} | {"chunk_size": str(part)}
        verify = {"href": f"{self.server.url}/lfs/{oid}/verify", "header": {}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def lfs_put(self, oid: str, *, query: dict[str, str], body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "the content does not have the announced SHA-256")
        self.server.blobs[oid] = body
        return _ok({})

    def lfs_put_part(self, oid: str, number: str, *, query: dict[str, str], body: bytes) -> Answer:
        self.server.parts[oid, int(number)] = body
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def lfs_complete(self, oid: str, *, query: dict[str, str], body: bytes) -> Answer:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        return self.lfs_put(oid, query=query, body=b"".join(self.server.parts[oid, n] for n in numbers))

    def lfs_verify(self, oid: str, *, query: dict[str, str], body: bytes) -> Answer:
        if len(self.server.blobs.get(oid, b"")) != json.loads(body)["size"]:
            raise HubError(404, "the object was not uploaded")
        return _ok({})

    def commit(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> Answer:
        self._require_write()
        repository = self._repository(name)
        parent = self._commit_of(repository, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        expected = lines[0]["value"].get("parentCommit")
        if expected not in (None, parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        ref, answer = revision, {}
        if query.get("create_pr") == "1":
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.server.url}/{name}/discussions/{number}"}
        sha = repository.commit(ref, files)
        return _ok({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, **answer})

    def _apply(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.server.blobs:
                raise HubError(400, f"{value['path']}: the LFS object was not uploaded")
            files[value["path"]] = Entry(self.server.blobs[value["oid"]], True)
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise HubError(400, f"unknown operation {key}")

    # downloading

    def resolve(self, name: str, revision: str, path: str, *, query: dict[str, str], body: bytes) -> Answer:
        repository = self._repository(name)
        sha = self._commit_of(repository, revision)
        entry = repository.commits[sha].get(path)
        if entry is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers["X-Repo-Commit"] = sha
            raise error
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        if not entry.large:
            return self._ranged(entry.content, headers)
        self.server.blobs[entry.oid] = entry.content
        linked = {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(len(entry.content))}
        return 302, {**headers, **linked, "Location": f"{self.server.storage_url}/{entry.oid}"}, b""

    def cdn(self, oid: str, *, query: dict[str, str], body: bytes) -> Answer:
        if "Authorization" in self.headers:
            raise HubError(400, "a token was sent to another host")
        return self._ranged(self.server.blobs[oid], {"ETag": '"of the storage, not of the file"'})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Answer:
        status, total = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            if start >= total:
                raise HubError(416, "Requested range not satisfiable")
            status, content = 206, content[start:]
            headers = {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        if self.injected.change is not None:
            length = len(content)
            content = self.injected.change(content)
            if self.injected.keep_length:
                headers = {**headers, "Content-Length": str(length)}
        return status, headers, content


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", "branch"),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", "commit"),
    ("GET", rf"/api/models/{REPO}/refs", "refs"),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", "info"),
    ("GET", rf"/api/models/{REPO}", "info"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", r"/lfs/(\w+)/verify", "lfs_verify"),
    ("PUT", r"/lfs/(\w+)/(\d+)", "lfs_put_part"),
    ("PUT", r"/lfs/(\w+)", "lfs_put"),
    ("POST", r"/lfs/(\w+)", "lfs_complete"),
    ("GET|HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET|HEAD", r"/cdn/(\w+)", "cdn"),
]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _ok(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, _json(value)


def _metadata_errors(card: str) -> list[str]:
    """What the Hub finds wrong with a card's metadata."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return ["no YAML metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)]
    errors = [
        f'"{key}" must be a list of strings'
        for key in ("tags", "datasets", "metrics")
        if not (isinstance(data.get(key, []), list) and all(isinstance(item, str) for item in data.get(key, [])))
    ]
    if not re.fullmatch(r"[a-z0-9.+-]+", data.get("license", "mit")):
        errors.append('"license" must be one of the known identifiers')
    for name in [data[key] for key in ("base_model",) if key in data]:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            errors.append('"base_model" must be a model id')
    for result in (r for index in data.get("model-index", []) for r in index["results"]):
        errors += [f'"model-index" lacks {key}' for key in ("task", "dataset", "metrics") if key not in result]
    return errors


@contextlib.contextmanager
def running_hub(**options: Any) -> Iterator[HubServer]:
    """A server on a port of its own, until the block ends."""
    server = HubServer(**options)
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
