"""Connections of the network that break in the middle, with both clients."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import pytest

from pocl_client import AsyncClient, Client, RetryPolicy
from pocl_client.responses import MessageContent
from tests.client.fakes import KEY

pytestmark = pytest.mark.system

CONTENT = os.urandom(3_000_000)
FAST = RetryPolicy(first_wait=0.01, max_wait=0.01, random=lambda: 0.0)
EVENTS = 5


@dataclass
class Broken:
    """What the server has been asked for."""

    ranges: list[str] = field(default_factory=list)
    resumed_at: list[str | None] = field(default_factory=list)


class BreakingServer(ThreadingHTTPServer):
    """Closes each connection in the middle of a body, once for each range and for each event."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen = Broken()
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: BreakingServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.endswith("/manifest"):
            self._send_manifest()
        elif "/files/" in self.path:
            self._send_range()
        else:
            self._send_events()

    def _send_manifest(self) -> None:
        digest = hashlib.sha256(CONTENT).hexdigest()
        files = [{"path": "model.safetensors", "size": len(CONTENT), "sha256": digest}]
        body = json.dumps({"format": 1, "files": files}).encode()
        self._begin(200, ("content-length", str(len(body))), ("content-type", "application/json"))
        self.wfile.write(body)

    def _send_range(self) -> None:
        asked = self.headers["range"]
        with self.server.lock:
            is_first = not any(each == asked for each in self.server.seen.ranges)
            self.server.seen.ranges.append(asked)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        body = CONTENT[first : last + 1]
        content_range = f"bytes {first}-{last}/{len(CONTENT)}"
        self._begin(206, ("content-length", str(len(body))), ("content-range", content_range))
        if is_first and len(body) > 500_000:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _send_events(self) -> None:
        last = self.headers["last-event-id"]
        with self.server.lock:
            self.server.seen.resumed_at.append(last)
        self._begin(200, ("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
        number = int(last or 0) + 1
        # One whole message and a half, and then nothing more: the last chunk that ends a body never comes.
        self._send_chunk(b"retry: 1\n" + message(number))
        if number < EVENTS:
            self._send_chunk(message(number + 1)[:20])
        self.close_connection = True

    def _begin(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _send_chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def breaking_server() -> Iterator[tuple[str, Broken]]:
    """The address of the server, and what it has been asked for."""
    server = BreakingServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def message(number: int) -> bytes:
    event = {"id": number, "at": "2026-11-24T10:00:00Z", "type": "status", "data": {}}
    kind = "end" if number == EVENTS else "state"
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(event)}\n\n".encode()


def number_of(content: MessageContent) -> int:
    return int(content.model_dump()["id"])


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_no_proxy_is_asked_for_a_service_of_this_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Nobody listens there.
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with breaking_server() as (url, _), Client(url, KEY, retries=FAST) as client:
        assert client.checkpoints.manifest("ckpt_1").files[0].size == len(CONTENT)


def test_a_download_goes_on_within_its_parts(tmp_path: Path) -> None:
    with breaking_server() as (url, seen), Client(url, KEY, retries=FAST) as client:
        target = client.checkpoints.download("ckpt_1", tmp_path / "model")
    assert (target / "model.safetensors").read_bytes() == CONTENT
    starts = [int(each.removeprefix("bytes=").split("-")[0]) for each in seen.ranges]
    # It goes on where a connection broke, and begins nowhere anew.
    assert starts == sorted(set(starts))
    assert len(starts) > 1


def test_a_download_with_await_goes_on_within_its_parts(tmp_path: Path) -> None:
    async def download(url: str) -> None:
        async with AsyncClient(url, KEY, retries=FAST) as client:
            await client.checkpoints.download("ckpt_1", tmp_path / "model")

    with breaking_server() as (url, seen):
        anyio.run(download, url)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == CONTENT
    assert len(seen.ranges) > 1


def test_a_stream_goes_on_over_broken_connections() -> None:
    with breaking_server() as (url, seen), Client(url, KEY, retries=FAST) as client:
        numbers = [number_of(each.content) for each in client.jobs.stream("job_1")]
    assert numbers == list(range(1, EVENTS + 1))
    assert seen.resumed_at == [None, *map(str, range(1, EVENTS))]


def test_a_stream_with_await_goes_on_over_broken_connections() -> None:
    async def follow(url: str) -> list[int]:
        async with AsyncClient(url, KEY, retries=FAST) as client:
            return [number_of(each.content) async for each in client.jobs.stream("job_1")]

    with breaking_server() as (url, _):
        assert anyio.run(follow, url) == list(range(1, EVENTS + 1))
