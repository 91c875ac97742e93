"""Event streams of a job: no event is lost or doubled, and a slow client costs nothing."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.types import Message

from domain.db import Database
from domain.jobs.leases import Claim
from domain.jobs.snapshot import job_snapshots
from domain.settings import Settings
from pocl.events import EventEnvelope, PhaseChanged
from tests.support.requests import expect_problem, http_scope, pointers
from tests.support.rows import EPOCH, claim_job, envelopes, step_logged
from tests.support.watchers import recorded_queries, run_and_close
from tests.support.worker_actions import succeed_job, write_events

TIMEOUT_SECONDS = 60


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"watch_seconds": 0.005})


def add_events(database: Database, claim: Claim, number: int, events: int = 1) -> None:
    """Add so many events to the history of a job."""
    phases = [PhaseChanged(phase="training") for _ in range(events)]
    write_events(database, claim, envelopes(*phases), offset=number)


def parse_events(content: bytes) -> list[dict[str, Any]]:
    events = [json.loads(data) for data in re.findall(rb"^data: (.*)$", content, re.MULTILINE)]
    assert [int(number) for number in re.findall(rb"^id: (\d+)", content, re.MULTILINE)] == [
        each["id"] for each in events
    ]
    return events


def event_numbers(content: bytes) -> list[int]:
    return [event["id"] for event in parse_events(content)]


class StreamClient:
    """A client that calls the application itself, and decides when to read and when to disconnect."""

    def __init__(
        self,
        app: FastAPI,
        job_id: str,
        after: int | str | None = 0,
        *,
        path: str = "events/stream",
        query: str = "",
    ) -> None:
        self._app, self._job_id, self._after, self._path, self._query = app, job_id, after, path, query
        self._disconnected = asyncio.Event()
        self._requested = False
        self.reading = asyncio.Event()
        self.reading.set()
        self.received = asyncio.Event()
        self.messages: list[Message] = []

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def closed(self) -> bool:
        return self.messages[-1].get("more_body") is False

    async def listen(self) -> None:
        headers = {"last-event-id": str(self._after)} if self._after else {}
        scope = http_scope("GET", f"/v1/jobs/{self._job_id}/{self._path}", headers)
        scope["query_string"] = self._query.encode()
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._requested:
            self._requested = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reading.wait()
        self.messages.append(message)
        self.received.set()

    async def receive_until(self, content: bytes) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while content not in self.content:
                self.received.clear()
                await self.received.wait()

    def disconnect(self) -> None:
        self._disconnected.set()


@asynccontextmanager
async def listening(client: StreamClient) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(client.listen())
    try:
        yield task
    finally:
        client.disconnect()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await task


def test_invalid_event_number_is_rejected(client: TestClient, database: Database) -> None:
    address = f"/v1/jobs/{claim_job(database).job_id}/events/stream"
    for wrong in ("-1", "x", "1.5", str(2**31)):
        problem = expect_problem(client.get(address, headers={"last-event-id": wrong}), 422, "invalid")
        assert pointers(problem) == ["/header/Last-Event-ID"]
        assert pointers(expect_problem(client.get(address, params={"after": wrong}), 422, "invalid")) == [
            "/query/after"
        ]
    expect_problem(client.get("/v1/jobs/job_00000000/events/stream"), 404, "job_not_found")


@given(cuts=st.lists(st.integers(0, 130), max_size=4))
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_resumes_after_any_event(client: TestClient, ended: tuple[str, int], cuts: list[int]) -> None:
    job_id, last = ended
    address = f"/v1/jobs/{job_id}/events/stream"
    for cut in cuts:
        response = client.get(address, params={"after": 1}, headers={"last-event-id": str(cut)})
        if cut >= last:
            # A browser that gets 204 does not reconnect.
            assert (response.status_code, response.content) == (204, b"")
        else:
            assert event_numbers(response.content) == list(range(cut + 1, last + 1))
            assert parse_events(response.content)[-1]["data"]["to"] == "succeeded"


@pytest.fixture
def ended(database: Database) -> tuple[str, int]:
    """A job with a history of several pages, and the number of its last event."""
    claim = claim_job(database)
    add_events(database, claim, 1, events=120)
    succeed_job(database, claim)
    with database.transaction(write=False) as session:
        return claim.job_id, job_snapshots(session, [claim.job_id], worker_seconds=60)[claim.job_id].event_seq


def test_a_stream_is_neither_cached_nor_buffered(client: TestClient, ended: tuple[str, int]) -> None:
    response = client.get(f"/v1/jobs/{ended[0]}/events/stream")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert response.text.startswith("retry: ")


def test_resumed_streams_of_any_process_deliver_each_event_once(
    app: FastAPI, database: Database, other_app: FastAPI
) -> None:
    claim = claim_job(database)

    async def follow() -> list[int]:
        received: list[int] = []
        for round_ in range(1, 7):
            client = StreamClient((app, other_app)[round_ % 2], claim.job_id, after=received[-1] if received else 0)
            async with listening(client):
                await asyncio.to_thread(add_events, database, claim, round_, round_)
                total = 1 + sum(range(1, round_ + 1))
                await client.receive_until(b"id: %d\n" % total)
            received += event_numbers(client.content)
        last = StreamClient(app, claim.job_id, after=received[-1])
        async with listening(last) as task:
            await asyncio.to_thread(succeed_job, database, claim)
            # The stream ends by itself, since the job has ended.
            await task
        assert last.closed
        return received + event_numbers(last.content)

    received = run_and_close(follow(), app.state.watcher)
    assert received == list(range(1, len(received) + 1))
    assert len(received) > 21


def test_a_stream_without_events_sends_keep_alives_while_the_job_progresses(app: FastAPI, database: Database) -> None:
    app.state.settings = app.state.settings.model_copy(update={"keep_alive_seconds": 0.05})
    claim = claim_job(database)

    async def follow() -> bytes:
        client = StreamClient(app, claim.job_id)
        async with listening(client):
            for number in range(1, 4):
                await asyncio.to_thread(
                    write_events, database, claim, [EventEnvelope(at=EPOCH, event=step_logged(1))], offset=number
                )
            await client.receive_until(b": keep-alive\n" * 2)
        return client.content

    assert run_and_close(follow(), app.state.watcher).count(b": keep-alive") >= 2


def test_a_slow_reader_causes_no_reads_and_misses_no_event(app: FastAPI, database: Database) -> None:
    claim = claim_job(database)
    add_events(database, claim, 1, events=500)
    succeed_job(database, claim)

    async def follow() -> tuple[int, list[int]]:
        client = StreamClient(app, claim.job_id)
        client.reading.clear()
        with recorded_queries(database) as queries:
            task = asyncio.create_task(client.listen())
            while not app.state.watcher.subscriptions:
                await asyncio.sleep(0)
            await app.state.watcher.snapshot(claim.job_id)
            pages = sum("job_events" in statement for statement in queries)
        client.reading.set()
        await task
        return pages, event_numbers(client.content)

    pages, received = run_and_close(follow(), app.state.watcher)
    assert pages <= 1
    assert received == list(range(1, len(received) + 1))
    assert len(received) > 500


def test_disconnects_and_shutdown_leave_no_subscription(app: FastAPI, database: Database) -> None:
    claim = claim_job(database)

    async def follow() -> tuple[int, bool]:
        first, second = StreamClient(app, claim.job_id), StreamClient(app, claim.job_id)
        async with listening(first), listening(second) as task:
            await first.receive_until(b"id: 1\n")
            await second.receive_until(b"id: 1\n")
            first.disconnect()
            while app.state.watcher.subscriptions > 1:
                await asyncio.sleep(0)
            app.state.watcher.close()
            await task
        return app.state.watcher.subscriptions, second.closed

    assert run_and_close(follow(), app.state.watcher) == (0, True)
