"""Long polls and event streams: nothing is lost or doubled, and a client that waits holds nothing."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from starlette.types import Message

from api.app import create_app
from domain.db import Database
from domain.jobs import actions
from domain.jobs.event_recorder import apply_events
from domain.jobs.leases import Claim, claim_next, settle
from domain.jobs.models import Job
from domain.jobs.snapshot import job_snapshots
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.settings import Settings
from domain.workers.models import Device
from domain.workers.repository import register_worker
from pocl.events import EventEnvelope, PhaseChanged
from tests.api.jobs.test_watcher import recorded_queries, run
from tests.support.requests import LOOPBACK, expect_problem, http_scope, pointers
from tests.support.rows import EPOCH, add_job, claim_job, envelopes, step_logged

TIMEOUT_SECONDS = 60


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"watch_seconds": 0.005, "max_followers": 3})


@pytest.fixture
def other(app: FastAPI, settings: Settings) -> Iterator[FastAPI]:
    """A second API process, as it were, over the same database."""
    del app  # The fixture has made the schema.
    other = create_app(settings)
    yield other
    other.state.database.close()


def add_events(database: Database, claim: Claim, number: int, events: int = 1) -> None:
    """Add events to the history of a job."""
    phases = [PhaseChanged(phase="training") for _ in range(events)]
    write(database, claim, envelopes(*phases), number)


def write(database: Database, claim: Claim, events: list[EventEnvelope], offset: int) -> None:
    with database.transaction(write=True) as session:
        apply_events(session, claim, events, offset=offset)


def succeed(database: Database, claim: Claim) -> None:
    with database.transaction(write=True) as session:
        assert settle(session, claim, AttemptOutcome.succeeded()) is JobStatus.SUCCEEDED


def get(app: FastAPI, path: str, headers: dict[str, str] | None = None) -> Any:
    """A request within the running loop."""

    async def request() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url=LOOPBACK, timeout=TIMEOUT_SECONDS) as client:
            return await client.get(path, headers=headers)

    return asyncio.create_task(request())


def parse_events(content: bytes) -> list[dict[str, Any]]:
    events = [json.loads(data) for data in re.findall(rb"^data: (.*)$", content, re.MULTILINE)]
    assert [int(number) for number in re.findall(rb"^id: (.*)$", content, re.MULTILINE)] == [
        each["id"] for each in events
    ]
    return events


def event_numbers(content: bytes) -> list[int]:
    return [event["id"] for event in parse_events(content)]


class StreamClient:
    """A client that calls the application itself, and decides when to read and when to disconnect."""

    def __init__(self, app: FastAPI, job_id: str, after: int = 0) -> None:
        self._app, self._job_id, self._after = app, job_id, after
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
        path = f"/v1/jobs/{self._job_id}/events/stream"
        scope = http_scope("GET", path, {"last-event-id": str(self._after)})
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


# --- Long polls -----------------------------------------------------------------------------------------


def test_invalid_wait_is_rejected(client: TestClient, database: Database) -> None:
    job_id = claim_job(database).job_id
    for wait in ("-1", "60.5", "nan", "inf", "soon", ""):
        problem = expect_problem(client.get(f"/v1/jobs/{job_id}", params={"wait": wait}), 422, "invalid")
        assert pointers(problem) == ["/query/wait"]


def test_a_long_poll_times_out_unchanged(client: TestClient, database: Database) -> None:
    address = f"/v1/jobs/{claim_job(database).job_id}"
    etag = client.get(address).headers["etag"]
    assert client.get(address, params={"wait": 0.01}, headers={"if-none-match": etag}).status_code == 304
    assert client.get(address, params={"wait": 0.01}).headers["etag"] == etag


def test_a_long_poll_of_a_changed_job_returns_at_once(client: TestClient, database: Database) -> None:
    claim = claim_job(database)
    address = f"/v1/jobs/{claim.job_id}"
    assert client.get(address, params={"wait": TIMEOUT_SECONDS}, headers={"if-none-match": '"old"'}).status_code == 200
    succeed(database, claim)
    assert client.get(address, params={"wait": TIMEOUT_SECONDS}).json()["status"] == "succeeded"


@pytest.mark.parametrize("conditional", [True, False])
def test_a_long_poll_returns_on_a_change_by_another_process(
    app: FastAPI, database: Database, other: FastAPI, conditional: bool
) -> None:
    claim = claim_job(database)
    address = f"/v1/jobs/{claim.job_id}"

    async def wait() -> httpx2.Response:
        first = await get(app, address)
        headers = {"if-none-match": first.headers["etag"]} if conditional else {}
        waiting = get(app, f"{address}?wait={TIMEOUT_SECONDS}", headers)
        while not app.state.watcher.subscriptions:
            await asyncio.sleep(0)
        await asyncio.to_thread(write, other.state.database, claim, envelopes(step_logged(1)), 1)
        response: httpx2.Response = await waiting
        return response

    response = run(wait(), app.state.watcher)
    assert (response.status_code, response.json()["progress"]["step"]) == (200, 1)


def test_a_representation_is_rendered_once_and_not_for_a_304(client: TestClient, database: Database) -> None:
    address = f"/v1/jobs/{claim_job(database).job_id}"
    etag = client.get(address).headers["etag"]
    with recorded_queries(database) as queries:
        assert client.get(address).headers["etag"] == etag
        assert client.get(address, headers={"if-none-match": etag}).status_code == 304
    assert len(queries) == 2


def test_different_representations_have_different_etags(client: TestClient, database: Database) -> None:
    with database.transaction(write=True) as session:
        job_id = add_job(session).id

    def register(session: Session) -> None:
        register_worker(session, "w", [Device("cpu", "CPU", None)])

    def delete_other(session: Session) -> None:
        session.execute(sa.delete(Job).where(Job.id != job_id))

    changes: list[Callable[[Session], object]] = [
        register,
        lambda session: add_job(session, priority=9),
        delete_other,
        lambda session: actions.update_job(session, "default", job_id, {"name": "renamed"}),
        lambda session: claim_next(session, worker="w", lease_seconds=60),
        lambda session: actions.pause_job(session, "default", job_id, "stage_end"),
        lambda session: actions.pause_job(session, "default", job_id, "now"),
        lambda session: actions.cancel_job(session, "default", job_id),
    ]
    shown: dict[str, bytes] = {}
    for change in changes:
        with database.transaction(write=True) as session:
            change(session)
        response = client.get(f"/v1/jobs/{job_id}")
        assert shown.setdefault(response.headers["etag"], response.content) == response.content
    # The other job came and went: the third representation equals the first.
    assert len(shown) == len(set(shown.values())) == len(changes) - 1


def test_the_fast_path_answers_as_the_router_does(app: FastAPI, client: TestClient, database: Database) -> None:
    def same(path: str, headers: dict[str, str]) -> httpx2.Response:
        responses = [client.get(path, params=params, headers=headers) for params in ({}, {"wait": 0})]
        plain, waiting = ([response.status_code, _without_request_id(response)] for response in responses)
        assert plain == waiting
        return responses[0]

    known = f"/v1/jobs/{claim_job(database).job_id}"
    etag = same(known, {}).headers["etag"]
    assert same(known, {"if-none-match": etag}).status_code == 304
    assert same("/v1/jobs/job_00000000", {}).status_code == 404
    app.state.settings = app.state.settings.model_copy(update={"api_key": SecretStr("a-key-of-some-length")})
    assert same(known, {"authorization": "Bearer another"}).status_code == 401
    assert same(known, {"authorization": "Bearer a-key-of-some-length"}).status_code == 200


def _without_request_id(response: httpx2.Response) -> Any:
    """Headers and content of a response without what is unique to a request."""
    headers = {name: value for name, value in response.headers.items() if name != "x-request-id"}
    if response.status_code < 400:
        return headers, response.content
    problem = response.json()
    return headers, {name: problem[name] for name in problem if name not in ("request_id", "instance")}


def test_followers_beyond_the_limit_are_refused_as_retryable(app: FastAPI, database: Database) -> None:
    job_id = claim_job(database).job_id

    async def exceed_limit() -> list[httpx2.Response]:
        waiting = [get(app, f"/v1/jobs/{job_id}?wait={TIMEOUT_SECONDS}") for _ in range(3)]
        while app.state.watcher.subscriptions < 3:
            await asyncio.sleep(0)
        refused = [await get(app, f"/v1/jobs/{job_id}?wait=1"), await get(app, f"/v1/jobs/{job_id}/events/stream")]
        app.state.watcher.close()
        return refused + [await each for each in waiting]

    first, second, *others = run(exceed_limit(), app.state.watcher)
    for refused in (first, second):
        assert expect_problem(refused, 503, "too_many_followers")["retryable"] is True
        assert refused.headers["retry-after"]
    assert [response.status_code for response in others] == [200] * 3


# --- Streams --------------------------------------------------------------------------------------------


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
    succeed(database, claim)
    with database.transaction(write=False) as session:
        return claim.job_id, job_snapshots(session, [claim.job_id], worker_seconds=60)[claim.job_id].event_seq


def test_a_stream_is_neither_cached_nor_buffered(client: TestClient, ended: tuple[str, int]) -> None:
    response = client.get(f"/v1/jobs/{ended[0]}/events/stream")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert response.text.startswith("retry: ")


def test_resumed_streams_of_any_process_deliver_each_event_once(
    app: FastAPI, database: Database, other: FastAPI
) -> None:
    claim = claim_job(database)

    async def follow() -> list[int]:
        received: list[int] = []
        for round_ in range(1, 7):
            client = StreamClient((app, other)[round_ % 2], claim.job_id, after=received[-1] if received else 0)
            async with listening(client):
                await asyncio.to_thread(add_events, database, claim, round_, round_)
                total = 1 + sum(range(1, round_ + 1))
                await client.receive_until(b"id: %d\n" % total)
            received += event_numbers(client.content)
        last = StreamClient(app, claim.job_id, after=received[-1])
        async with listening(last) as task:
            await asyncio.to_thread(succeed, database, claim)
            # The stream ends by itself, since the job has ended.
            await task
        assert last.closed
        return received + event_numbers(last.content)

    received = run(follow(), app.state.watcher)
    assert received == list(range(1, len(received) + 1))
    assert len(received) > 21


def test_a_stream_without_events_sends_keep_alives_while_the_job_progresses(app: FastAPI, database: Database) -> None:
    app.state.settings = app.state.settings.model_copy(update={"keep_alive_seconds": 0.05})
    claim = claim_job(database)

    async def follow() -> bytes:
        client = StreamClient(app, claim.job_id)
        async with listening(client):
            for number in range(1, 4):
                await asyncio.to_thread(write, database, claim, [EventEnvelope(at=EPOCH, event=step_logged(1))], number)
            await client.receive_until(b": keep-alive\n\n" * 2)
        return client.content

    assert run(follow(), app.state.watcher).count(b": keep-alive") >= 2


def test_a_slow_reader_causes_no_reads_and_misses_no_event(app: FastAPI, database: Database) -> None:
    claim = claim_job(database)
    add_events(database, claim, 1, events=500)
    succeed(database, claim)

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

    pages, received = run(follow(), app.state.watcher)
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

    assert run(follow(), app.state.watcher) == (0, True)
