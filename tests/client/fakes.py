"""A service that tests write themselves, a clock that nobody waits for, and a retry policy without chance."""

import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from pocl_client import Client, RetryPolicy
from pocl_client._sync.concurrency import Clock

URL = "http://service.test"
KEY = "pocl_test_key"
STEADY = RetryPolicy(random=lambda: 1.0)
"""Waits are as long as their bounds."""

Answer = httpx2.Response | Exception
Handler = Callable[[httpx2.Request], Answer]


class FakeClock(Clock):
    """Time passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class FakeService:
    """Answers requests by a function, and notes them."""

    handler: Handler
    requests: list[httpx2.Request] = field(default_factory=list)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        answer = self.handler(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def headers(self, name: str) -> list[str | None]:
        """A header of each request."""
        return [request.headers.get(name) for request in self.requests]


def answering(*answers: Answer) -> FakeService:
    """A service with these answers, one after the other."""
    waiting = iter(answers)
    return FakeService(lambda _: next(waiting))


def connect(service: FakeService, *, clock: Clock | None = None, retries: RetryPolicy = STEADY) -> Client:
    """A client of the service."""
    return Client(URL, KEY, transport=httpx2.MockTransport(service), clock=clock or FakeClock(), retries=retries)


def problem(status: int, code: str, **fields: Any) -> httpx2.Response:
    """A response with problem details."""
    headers = {"content-type": "application/problem+json", **fields.pop("headers", {})}
    body = {
        "type": "about:blank",
        "title": code,
        "status": status,
        "detail": f"This is {code}.",
        "code": code,
        **fields,
    }
    return httpx2.Response(status, json=body, headers=headers)


def job(status: str = "running", **fields: Any) -> dict[str, Any]:
    """A job as the service shows it, as far as clients need it."""
    at = "2026-11-24T10:00:00Z"
    return {
        "id": "job_1", "object": "job", "name": "first", "labels": {}, "priority": 0, "status": status, "phase": None,
        "progress": {
            "percent": 0, "step": 0, "total_steps": 8, "stage": None, "stages": 2, "tokens_seen": 0,
            "tokens_per_second": None, "updated_at": None,
        },
        "eta": None, "end_reason": None, "attempts_spent": 0, "max_attempts": 3, "not_before": None, "created_at": at,
        "updated_at": at, "started_at": None, "finished_at": None, "cancel_requested_at": None, "pause_at": None,
        "retry_of": None, "branch_of": None, "stored_bytes": 0,
        "limits": {"max_runtime_seconds": None, "max_wait_seconds": None, "max_attempts": 3},
        "failed_attempts": [], "queue": None, "latest": None, "warnings": [], "retention": None, "trackers": [],
        "publication": None,
        "history": {"events_dropped": 0, "metrics_dropped": 0, "deleted_at": None, "metric_window": 1},
        "plan_warnings": [], "forecast": None, "encodings": [], "spec": {},
        **fields,
    }  # fmt: skip


class BrokenStream(httpx2.SyncByteStream):
    """A body that breaks off after its pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        raise httpx2.ReadError("the connection was reset")


def file_response(request: httpx2.Request, content: bytes, *, break_after: int | None = None) -> httpx2.Response:
    """The response to a request for a file, or a range of it.

    Args:
        break_after: the number of bytes after which the connection breaks.
    """
    digest = b64encode(hashlib.sha256(content).digest()).decode()
    headers = {"repr-digest": f"sha-256=:{digest}:", "accept-ranges": "bytes"}
    if request.method == "HEAD":
        return httpx2.Response(200, headers={**headers, "content-length": str(len(content))})
    status, first, stop = 200, 0, len(content)
    if asked := request.headers.get("range"):
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        status, stop = 206, min(last + 1, len(content))
        headers["content-range"] = f"bytes {first}-{stop - 1}/{len(content)}"
    body = content[first:stop]
    if break_after is not None and break_after < len(body):
        return httpx2.Response(status, headers=headers, stream=BrokenStream([body[:break_after]]))
    return httpx2.Response(status, headers=headers, content=body)
