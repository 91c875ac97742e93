"""A stand-in of the Hugging Face Hub: an HTTP server in a thread of this process, which `HF_ENDPOINT` names.

The real client, `huggingface_hub`, writes to it and reads from it, by the parts of the API that pushing and loading a
model need: repositories, branches, commits with regular and LFS files, uploads to signed addresses, trees and files.
Faults are put before requests of one's choice.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN: Final = "hf_the-write-token-of-the-tests"
_LFS: Final = re.compile(r"\.(safetensors|gguf|bin|png)$")
_ATTRIBUTES: Final = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_SIGNATURE: Final = "X-Signature=a-signature"
_REPO: Final = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Fault:
    """What befalls the requests that match, as often as `times` says."""

    method: str
    path: str
    """A regular expression that the path of the request has somewhere in it."""
    status: int | None = None
    """The answer in place of the right one; null: the connection is cut."""
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    """How much of the body is read before."""
    is_done_first: bool = False
    """Whether the server does what was asked before, so that the answer alone is lost."""
    call: Callable[[], object] | None = None
    """Called once the request has arrived."""
    times: int = 1


@dataclass
class Repository:
    """A repository: commits, each with the whole content of its files, and branches that name them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)
    """The commits of each branch, oldest first."""

    def add_commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Make a commit with these files the newest of a branch; its id."""
        history = self.branches.setdefault(branch, [])
        content = repr((branch, len(self.commits), sorted(files))).encode()
        commit = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        history.append(commit)
        return commit

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The files of the newest commit of a branch, but those that the Hub keeps itself."""
        newest = self.commits[self.branches[branch][-1]]
        return {path: content for path, content in newest.items() if path != ".gitattributes"}

    def commits_after_creation(self, branch: str = "main") -> int:
        """How many commits were pushed to a branch."""
        return len(self.branches[branch]) - 1


class HubServer:
    """The repositories, the requests that arrived, and the faults that are to come."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Uploaded LFS objects by their SHA-256."""
        self.parts: dict[tuple[str, int], bytes] = {}
        """Uploaded parts of LFS objects, by the object and the number of the part."""
        self.part_bytes: int | None = None
        """Objects that are larger are asked for in parts of so many bytes; null: none is."""
        self.owners = {"acme"}
        """The owners that the token may write to."""
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path of each."""
        self.authorizations: set[tuple[str, str | None]] = set()
        """Path and header `Authorization` of each."""
        self.lock = threading.RLock()
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where LFS objects are uploaded to: another host than that of the API, as with the Hub."""
        return f"http://localhost:{self.port}"

    def environment(self) -> dict[str, str]:
        """The variables that lead the client here, and past no proxy."""
        own = "127.0.0.1,localhost"
        return {"HF_ENDPOINT": self.endpoint, "NO_PROXY": own, "no_proxy": own}

    def create(self, repo: str, *, private: bool = True, files: Mapping[str, bytes] | None = None) -> Repository:
        """Make a repository as the Hub does: with a first commit."""
        made = Repository(private)
        made.add_commit("main", {".gitattributes": _ATTRIBUTES, **(files or {})})
        self.repositories[repo] = made
        return made

    def uploads(self) -> int:
        """How many LFS objects were begun to be uploaded."""
        return sum(method == "PUT" for method, _ in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _CutOff(Exception):
    """The connection is to be closed without an answer."""


@dataclass(frozen=True)
class _Request:
    hub: HubServer
    token: str | None
    body: bytes
    query: Mapping[str, list[str]]

    def json(self) -> Any:
        return json.loads(self.body)

    def repository(self, name: str, *, writes: bool = False) -> Repository:
        """A repository that the sender may see.

        Raises:
            _Refused: it is not there, or not for this token.
        """
        found = self.hub.repositories.get(name)
        if writes:
            self.require_writer(name.partition("/")[0])
        if found is None or (found.private and self.token != TOKEN):
            raise _Refused(404 if self.token == TOKEN else 401, "Repository not found", "RepoNotFound")
        return found

    def require_writer(self, owner: str) -> None:
        if self.token != TOKEN:
            raise _Refused(401, "Invalid username or password.")
        if owner not in self.hub.owners:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner}")


Answer = tuple[int, dict[str, str], bytes]


def _as_json(content: Any, status: int = 200) -> Answer:
    return status, {"content-type": "application/json"}, json.dumps(content).encode()


def _create(request: _Request) -> Answer:
    wanted = request.json()
    repo = f"{wanted['organization']}/{wanted['name']}"
    request.require_writer(wanted["organization"])
    address = f"{request.hub.endpoint}/{repo}"
    if repo in request.hub.repositories:
        return _as_json({"error": "You already created this model repo", "url": address}, 409)
    request.hub.create(repo, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return _as_json({"url": address, "name": repo})


def _validate_yaml(request: _Request) -> Answer:
    found = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
    try:
        yaml.safe_load(found[1] if found else "")
    except yaml.YAMLError:
        return _as_json({"warnings": [], "errors": [{"message": "invalid YAML"}]}, 400)
    return _as_json({"warnings": [], "errors": []})


def _commit_of(repository: Repository, revision: str) -> str:
    revision = unquote(revision)
    if revision in repository.branches:
        return repository.branches[revision][-1]
    if revision in repository.commits:
        return revision
    raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def _info(request: _Request, repo: str, revision: str = "main") -> Answer:
    repository = request.repository(repo)
    commit = _commit_of(repository, revision)
    siblings = [{"rfilename": path} for path in repository.commits[commit]]
    described = {"id": repo, "modelId": repo, "sha": commit, "private": repository.private, "siblings": siblings}
    return _as_json({**described, "tags": [], "downloads": 0, "likes": 0})


def _tree(request: _Request, repo: str, revision: str, path: str = "") -> Answer:
    repository = request.repository(repo)
    files = repository.commits[_commit_of(repository, revision)]
    prefix = f"{unquote(path)}/" if path else ""
    listed = {each: content for each, content in files.items() if each.startswith(prefix)}
    if prefix and not listed:
        raise _Refused(404, "Path does not exist", "EntryNotFound")
    folders = {parent for each in listed for parent in _parents(each)}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)
    ]
    entries += [_entry(each, content) for each, content in listed.items()]
    if request.query.get("recursive", ["False"])[0].lower() != "true":
        entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
    return _as_json(entries)


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if _LFS.search(path):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _create_branch(request: _Request, repo: str, branch: str) -> Answer:
    repository = request.repository(repo, writes=True)
    if unquote(branch) in repository.branches:
        return _as_json({"error": "Reference already exists"}, 409)
    repository.branches[unquote(branch)] = [repository.branches["main"][0]]
    return _as_json({}, 201)


def _preupload(request: _Request, repo: str, revision: str) -> Answer:
    repository = request.repository(repo, writes=True)
    present = repository.commits[_commit_of(repository, revision)]
    ignored = present.get(".gitignore", b"").decode().split()

    def describe(path: str) -> dict[str, Any]:
        is_lfs, content = bool(_LFS.search(path)), present.get(path)
        oid = None if content is None else hashlib.sha256(content).hexdigest() if is_lfs else _blob_id(content)
        mode = "lfs" if is_lfs else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": oid}

    return _as_json({"files": [describe(file["path"]) for file in request.json()["files"]]})


def _lfs_batch(request: _Request, repo: str) -> Answer:
    request.repository(repo, writes=True)

    def action(wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in request.hub.objects:
            return wanted
        address, part_bytes = f"{request.hub.storage}/objects/{wanted['oid']}", request.hub.part_bytes
        if part_bytes is None or wanted["size"] <= part_bytes:
            return {**wanted, "actions": {"upload": {"href": f"{address}?{_SIGNATURE}", "header": {}}}}
        numbers = range(1, -(-wanted["size"] // part_bytes) + 1)
        header = {f"{number:05}": f"{address}/{number}?{_SIGNATURE}" for number in numbers}
        upload = {"href": f"{address}/complete?{_SIGNATURE}", "header": {**header, "chunk_size": str(part_bytes)}}
        return {**wanted, "actions": {"upload": upload}}

    return _as_json({"transfer": "basic", "objects": [action(each) for each in request.json()["objects"]]})


def _require_signature(request: _Request) -> None:
    if request.query.get("X-Signature") != ["a-signature"] or request.token is not None:
        raise _Refused(403, "The address is not signed, or a token came with it.")


def _put_object(request: _Request, oid: str) -> Answer:
    _require_signature(request)
    return _keep_object(request.hub, oid, request.body)


def _put_part(request: _Request, oid: str, number: str) -> Answer:
    _require_signature(request)
    request.hub.parts[oid, int(number)] = request.body
    return 200, {"etag": f'"{number}"'}, b""


def _complete_parts(request: _Request, oid: str) -> Answer:
    _require_signature(request)
    parts = [request.hub.parts[oid, each["partNumber"]] for each in request.json()["parts"]]
    return _keep_object(request.hub, oid, b"".join(parts))


def _keep_object(hub: HubServer, oid: str, content: bytes) -> Answer:
    if hashlib.sha256(content).hexdigest() != oid:
        raise _Refused(400, "The content has another digest.")
    hub.objects[oid] = content
    return 200, {}, b""


def _commit(request: _Request, repo: str, revision: str) -> Answer:
    repository = request.repository(repo, writes=True)
    branch = unquote(revision)
    lines = [json.loads(line) for line in request.body.splitlines()]
    parent = repository.branches[branch][-1]
    if lines[0]["value"].get("parentCommit") not in (None, parent):
        raise _Refused(412, "A commit has happened since.")
    files = dict(repository.commits[parent])
    for line in lines[1:]:
        value = line["value"]
        match line["key"]:
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                if value["oid"] not in request.hub.objects:
                    raise _Refused(400, "An LFS object was not uploaded.")
                files[value["path"]] = request.hub.objects[value["oid"]]
            case "deletedFile":
                del files[value["path"]]
    commit = repository.add_commit(branch, files)
    address = f"{request.hub.endpoint}/{repo}/commit/{commit}"
    return _as_json({"success": True, "commitOid": commit, "commitUrl": address})


def _resolve(request: _Request, repo: str, revision: str, path: str) -> Answer:
    repository = request.repository(repo)
    commit = _commit_of(repository, revision)
    content = repository.commits[commit].get(unquote(path))
    if content is None:
        raise _Refused(404, "Entry not found", "EntryNotFound")
    etag = hashlib.sha256(content).hexdigest() if _LFS.search(path) else _blob_id(content)
    return 200, {"etag": f'"{etag}"', "x-repo-commit": commit, "content-type": "application/octet-stream"}, content


_ROUTES: Final[tuple[tuple[str, str, Callable[..., Answer]], ...]] = (
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("GET", f"/api/models/{_REPO}", _info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", _tree),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", _put_object),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", _put_part),
    ("POST", "/objects/(?P<oid>[0-9a-f]{64})/complete", _complete_parts),
    ("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def log_message(self, *_: object) -> None:
        """A test prints nothing."""

    def _serve(self, method: str) -> None:
        address = urlsplit(self.path)
        with self.hub.lock:
            self.hub.requests.append((method, address.path))
            self.hub.authorizations.add((address.path, self.headers.get("authorization")))
        try:
            status, headers, content = self._answer(method, address.path, parse_qs(address.query))
        except _Refused as refused:
            status, headers, content = _as_json({"error": refused.message}, refused.status)
            headers |= {"x-error-message": refused.message}
            headers |= {"x-error-code": refused.code} if refused.code else {}
        except _CutOff:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, method: str, path: str, query: Mapping[str, list[str]]) -> Answer:
        fault = self.hub.take_fault(method, path)
        if fault is not None and not fault.is_done_first:
            if fault.call is not None:
                fault.call()
            if fault.status is None:
                self.rfile.read(min(fault.after_bytes, int(self.headers.get("content-length", 0))))
                raise _CutOff
        request = _Request(self.hub, self._token(), self._body(), query)
        if fault is not None and not fault.is_done_first and fault.status is not None:
            return fault.status, dict(fault.headers), b"{}"
        answer = self._route(method, path, request)
        if fault is not None:
            raise _CutOff
        return answer

    def _route(self, method: str, path: str, request: _Request) -> Answer:
        with self.hub.lock:
            for wanted, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if wanted == method and found:
                    return answer(request, **{k: v for k, v in found.groupdict().items() if v is not None})
        raise _Refused(404, "No such address", "EntryNotFound")

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("content-length", 0)))


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub without repositories on a free port of loopback for as long as the block lasts."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # A client that hung up is no news.
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
