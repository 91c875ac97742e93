"""What a run takes from the Hub: allowed repositories, the bound of its cache, and progress of a download.

A server on this machine stands for the Hub, and the cache is laid out as the Hub's own client does it.
"""

import errno
import fcntl
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pocl.errors import EngineFailure, HubCacheFull, SpecInvalid
from pocl.models.hub import HUB_UNREACHABLE, HubPolicy, HuggingFaceHub, hub_failure, hub_policy
from pocl.models.hub_cache import HubCache
from pocl.spec.hub_allowlist import allows_repository

COMMITS = {"a": "a" * 40, "b": "b" * 40, "c": "c" * 40}
KIB = 1 << 10


def add_revision(cache: Path, repo: str, commit: str, size: int, used_at: float) -> Path:
    """A repository of one file, used last at this time."""
    folder = cache / f"models--acme--{repo}"
    blob = folder / "blobs" / commit
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(bytes(size))
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    os.utime(blob, (used_at, used_at))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    for position, (repo, commit) in enumerate(COMMITS.items()):
        add_revision(tmp_path, repo, commit, 100 * KIB, used_at=1_000_000 + position)
    return HubCache(tmp_path, 310 * KIB)


def repositories(cache: HubCache) -> list[str]:
    return sorted(path.name[-1] for path in cache.root.glob("models--*"))


def test_least_recently_used_revisions_make_room(cache: HubCache) -> None:
    assert cache.make_room(0)
    assert repositories(cache) == ["a", "b", "c"]
    assert cache.make_room(100 * KIB)
    assert repositories(cache) == ["b", "c"]


def test_repository_that_is_used_now_is_evicted_last(cache: HubCache) -> None:
    (cache.root / ".pocl").mkdir()
    (cache.root / ".pocl" / "models--acme--a").touch()
    assert cache.make_room(100 * KIB)
    assert repositories(cache) == ["a", "c"]


def test_repository_of_a_live_process_is_not_evicted(cache: HubCache) -> None:
    (cache.root / ".pocl").mkdir()
    # A lock through another open file excludes as one of another process does.
    with (cache.root / ".pocl" / "models--acme--a").open("w") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        os.utime(used.name, (0, 0))
        assert cache.make_room(100 * KIB)
        assert repositories(cache) == ["a", "c"]
        assert not cache.make_room(300 * KIB)
        assert repositories(cache) == ["a"]
    assert cache.make_room(300 * KIB)
    assert repositories(cache) == []


def test_downloads_that_were_broken_off_are_evicted_first(cache: HubCache) -> None:
    unfinished = cache.root / "models--acme--a" / "blobs" / "x.incomplete"
    unfinished.write_bytes(bytes(200 * KIB))
    assert cache.make_room(0)
    assert not unfinished.exists()
    assert repositories(cache) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("patterns", "repo", "allowed"),
    [
        (None, "anyone/anything", True),
        ([], "anyone/anything", False),
        (["acme/*"], "acme/model", True),
        (["acme/*"], "ACME/Model", True),
        (["acme/*"], "acme-evil/model", False),
        (["other/*", "acme/model-?"], "acme/model-7", True),
        (["acme/model-?"], "acme/model-77", False),
    ],
)
def test_allowed_repositories_match_a_pattern(patterns: list[str] | None, repo: str, *, allowed: bool) -> None:
    assert allows_repository(patterns, repo) is allowed


def test_engine_reads_no_repository_that_is_not_allowed(tmp_path: Path) -> None:
    with hub_policy(HubPolicy(allowed=["acme/*"])), pytest.raises(SpecInvalid, match=r"only acme/\*"):
        HuggingFaceHub(tmp_path).snapshot("other/model", "main", ["*"])


def test_failure_of_a_proxy_is_told_without_its_password() -> None:
    error = httpx2.ProxyError("http://user:secret@proxy refused")
    message = hub_failure("acme/model", error).message
    assert "secret" not in message
    assert "the proxy refused" in message


@pytest.mark.usefixtures("endpoint")
@pytest.mark.system
def test_a_cache_that_cannot_be_written_is_not_taken_for_a_hub_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HUB_UNREACHABLE) as raised:
        HuggingFaceHub(tmp_path / "file" / "cache").snapshot("acme/model", "main", ["*"])
    assert "cache of the Hub on this worker cannot be written" in hub_failure("acme/model", raised.value).message
    assert "did not answer" in hub_failure("acme/model", ConnectionRefusedError(errno.ECONNREFUSED, "")).message


@pytest.mark.parametrize("proxy", ["socks5h://user:secret@127.0.0.1:1080", "ftp://user:secret@proxy", "http://a:b:c"])
def test_proxy_that_cannot_be_used_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Whether it is installed or not.
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(EngineFailure, match="proxies of the worker cannot be used") as raised:
        HuggingFaceHub(tmp_path).snapshot("acme/model", "main", ["*"])
    assert "secret" not in raised.value.message
    assert raised.value.retryable
    # Without the Hub no proxy is asked.
    with pytest.raises(LocalEntryNotFoundError):
        HuggingFaceHub(tmp_path, offline=True).snapshot("acme/model", "main", ["*"])


class FakeHub(BaseHTTPRequestHandler):
    """A Hub with one repository of one file of a MiB."""

    content = bytes(1 << 20)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        body = self.content
        if self.path.startswith("/api/models/acme/model/tree"):
            entry = {"type": "file", "path": "model.safetensors", "size": len(self.content), "oid": "0" * 40}
            body = json.dumps([entry]).encode()
        elif self.path.startswith("/api/models/acme/model"):
            body = json.dumps({"id": "acme/model", "sha": COMMITS["a"], "siblings": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMITS["a"])
        self.send_header("ETag", '"0123456789"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield address
    server.shutdown()
    server.server_close()


@pytest.mark.system
def test_download_reports_its_bytes_and_makes_room(endpoint: str, tmp_path: Path) -> None:
    assert endpoint
    add_revision(tmp_path, "old", COMMITS["b"], 1 << 20, used_at=1_000_000)
    reports: list[tuple[int, int]] = []
    policy = HubPolicy(max_cache_bytes=3 << 19, on_progress=lambda done, total: reports.append((done, total)))
    with hub_policy(policy):
        directory = HuggingFaceHub(tmp_path).snapshot("acme/model", "main", ["*.safetensors"])
    assert (directory / "model.safetensors").stat().st_size == 1 << 20
    assert directory.name == COMMITS["a"]
    assert reports
    assert all(0 < done <= total for done, total in reports)
    assert not (tmp_path / "models--acme--old").exists()


@pytest.mark.system
def test_model_that_does_not_fit_into_the_cache_is_refused_before_it_is_fetched(endpoint: str, tmp_path: Path) -> None:
    assert endpoint
    with (
        hub_policy(HubPolicy(max_cache_bytes=1 << 19)),
        pytest.raises(HubCacheFull, match="1048576 bytes of acme/model"),
    ):
        HuggingFaceHub(tmp_path).snapshot("acme/model", "main", ["*.safetensors"])
    assert not list(tmp_path.glob("models--acme--model/blobs/*"))
