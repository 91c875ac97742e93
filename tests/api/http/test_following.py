"""Waiting for a job to change, and following its events: nothing lost, nothing doubled, nothing held."""

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
from tests.api.jobs.test_watcher import counted, run
from tests.support.requests import LOOPBACK, expect_problem, http_scope, pointers
from tests.support.rows import EPOCH, add_job, claim_job, envelopes, step_logged

PATIENT = 60


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"watch_seconds": 0.005, "max_followers": 3})


@pytest.fixture
def other(app: FastAPI, settings: Settings) -> Iterator[FastAPI]:
    """A second process, as it were, over the same database."""
    del app  # It made the schema.
    other = create_app(settings)
    yield other
    other.state.database.close()


def report(database: Database, held: Claim, number: int, events: int = 1) -> None:
    """Add some events to the history."""
    phases = [PhaseChanged(phase="training") for _ in range(events)]
    write(database, held, envelopes(*phases), number)


def write(database: Database, held: Claim, events: list[EventEnvelope], offset: int) -> None:
    with database.transaction(write=True) as session:
        apply_events(session, held, events, offset=offset)


def end(database: Database, held: Claim) -> None:
    with database.transaction(write=True) as session:
        assert settle(session, held, AttemptOutcome.succeeded()) is JobStatus.SUCCEEDED


def get(app: FastAPI, path: str, headers: dict[str, str] | None = None) -> Any:
    """A request within the running loop."""

    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url=LOOPBACK, timeout=PATIENT) as client:
            return await client.get(path, headers=headers)

    return asyncio.create_task(send())


def events_in(content: bytes) -> list[dict[str, Any]]:
    found = [json.loads(data) for data in re.findall(rb"^data: (.*)$", content, re.MULTILINE)]
    assert [int(number) for number in re.findall(rb"^id: (.*)$", content, re.MULTILINE)] == [
        each["id"] for each in found
    ]
    return found


def numbers(content: bytes) -> list[int]:
    return [event["id"] for event in events_in(content)]


class Listener:
    """A client on the application itself, who decides when to read and when to go away."""

    def __init__(self, app: FastAPI, job_id: str, after: int = 0) -> None:
        self._app, self._job_id, self._after = app, job_id, after
        self._gone = asyncio.Event()
        self._asked = False
        self.reads = asyncio.Event()
        self.reads.set()
        self.arrived = asyncio.Event()
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
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reads.wait()
        self.messages.append(message)
        self.arrived.set()

    async def has(self, content: bytes) -> None:
        async with asyncio.timeout(PATIENT):
            while content not in self.content:
                self.arrived.clear()
                await self.arrived.wait()

    def go_away(self) -> None:
        self._gone.set()


@asynccontextmanager
async def listening(listener: Listener) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(listener.listen())
    try:
        yield task
    finally:
        listener.go_away()
        async with asyncio.timeout(PATIENT):
            await task


# --- Long polls -----------------------------------------------------------------------------------------


def test_a_wait_that_cannot_be(client: TestClient, database: Database) -> None:
    job_id = claim_job(database).job_id
    for wait in ("-1", "60.5", "nan", "inf", "soon", ""):
        found = expect_problem(client.get(f"/v1/jobs/{job_id}", params={"wait": wait}), 422, "invalid")
        assert pointers(found) == ["/query/wait"]


def test_nothing_happens_until_the_time_is_up(client: TestClient, database: Database) -> None:
    address = f"/v1/jobs/{claim_job(database).job_id}"
    etag = client.get(address).headers["etag"]
    assert client.get(address, params={"wait": 0.01}, headers={"if-none-match": etag}).status_code == 304
    assert client.get(address, params={"wait": 0.01}).headers["etag"] == etag


def test_what_is_news_already_is_answered_at_once(client: TestClient, database: Database) -> None:
    held = claim_job(database)
    address = f"/v1/jobs/{held.job_id}"
    assert client.get(address, params={"wait": PATIENT}, headers={"if-none-match": '"old"'}).status_code == 200
    end(database, held)
    assert client.get(address, params={"wait": PATIENT}).json()["status"] == "succeeded"


@pytest.mark.parametrize("conditional", [True, False])
def test_a_change_made_elsewhere_wakes_who_waits(
    app: FastAPI, database: Database, other: FastAPI, conditional: bool
) -> None:
    held = claim_job(database)
    address = f"/v1/jobs/{held.job_id}"

    async def wait() -> httpx2.Response:
        first = await get(app, address)
        headers = {"if-none-match": first.headers["etag"]} if conditional else {}
        waiting = get(app, f"{address}?wait={PATIENT}", headers)
        while not app.state.watcher.subscriptions:
            await asyncio.sleep(0)
        await asyncio.to_thread(write, other.state.database, held, envelopes(step_logged(1)), 1)
        answer: httpx2.Response = await waiting
        return answer

    answer = run(wait(), app.state.watcher)
    assert (answer.status_code, answer.json()["progress"]["step"]) == (200, 1)


def test_an_answer_is_made_once_and_a_304_never(client: TestClient, database: Database) -> None:
    address = f"/v1/jobs/{claim_job(database).job_id}"
    etag = client.get(address).headers["etag"]
    with counted(database) as sent:
        assert client.get(address).headers["etag"] == etag
        assert client.get(address, headers={"if-none-match": etag}).status_code == 304
    assert len(sent) == 2


def test_what_is_shown_otherwise_has_another_tag(client: TestClient, database: Database) -> None:
    with database.transaction(write=True) as session:
        job_id = add_job(session).id

    def worker_comes(session: Session) -> None:
        register_worker(session, "w", [Device("cpu", "CPU", None)])

    def other_goes_first(session: Session) -> None:
        session.execute(sa.delete(Job).where(Job.id != job_id))

    changes: list[Callable[[Session], object]] = [
        worker_comes,
        lambda session: add_job(session, priority=9),
        other_goes_first,
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
        answer = client.get(f"/v1/jobs/{job_id}")
        assert shown.setdefault(answer.headers["etag"], answer.content) == answer.content
    # The other job came and went: the third state is the first one.
    assert len(shown) == len(set(shown.values())) == len(changes) - 1


def test_a_plain_poll_is_answered_as_one_that_says_that_it_does_not_wait(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    def same(path: str, headers: dict[str, str]) -> httpx2.Response:
        answers = [client.get(path, params=params, headers=headers) for params in ({}, {"wait": 0})]
        plain, waiting = ([answer.status_code, _lasting(answer)] for answer in answers)
        assert plain == waiting
        return answers[0]

    known = f"/v1/jobs/{claim_job(database).job_id}"
    etag = same(known, {}).headers["etag"]
    assert same(known, {"if-none-match": etag}).status_code == 304
    assert same("/v1/jobs/job_00000000", {}).status_code == 404
    app.state.settings = app.state.settings.model_copy(update={"api_key": SecretStr("a-key-of-some-length")})
    assert same(known, {"authorization": "Bearer another"}).status_code == 401
    assert same(known, {"authorization": "Bearer a-key-of-some-length"}).status_code == 200


def _lasting(answer: httpx2.Response) -> Any:
    """What does not differ from one request to the next."""
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    if answer.status_code < 400:
        return headers, answer.content
    told = answer.json()
    return headers, {name: told[name] for name in told if name not in ("request_id", "instance")}


def test_who_comes_last_is_told_to_come_again(app: FastAPI, database: Database) -> None:
    job_id = claim_job(database).job_id

    async def crowd() -> list[httpx2.Response]:
        waiting = [get(app, f"/v1/jobs/{job_id}?wait={PATIENT}") for _ in range(3)]
        while app.state.watcher.subscriptions < 3:
            await asyncio.sleep(0)
        refused = [await get(app, f"/v1/jobs/{job_id}?wait=1"), await get(app, f"/v1/jobs/{job_id}/events/stream")]
        app.state.watcher.close()
        return refused + [await each for each in waiting]

    first, second, *others = run(crowd(), app.state.watcher)
    for refused in (first, second):
        assert expect_problem(refused, 503, "too_many_followers")["retryable"] is True
        assert refused.headers["retry-after"]
    assert [answer.status_code for answer in others] == [200] * 3


# --- Streams --------------------------------------------------------------------------------------------


def test_a_number_that_cannot_be(client: TestClient, database: Database) -> None:
    address = f"/v1/jobs/{claim_job(database).job_id}/events/stream"
    for wrong in ("-1", "x", "1.5", str(2**31)):
        found = expect_problem(client.get(address, headers={"last-event-id": wrong}), 422, "invalid")
        assert pointers(found) == ["/header/Last-Event-ID"]
        assert pointers(expect_problem(client.get(address, params={"after": wrong}), 422, "invalid")) == [
            "/query/after"
        ]
    expect_problem(client.get("/v1/jobs/job_00000000/events/stream"), 404, "job_not_found")


@given(cuts=st.lists(st.integers(0, 130), max_size=4))
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_from_any_position_comes_what_follows_it(client: TestClient, ended: tuple[str, int], cuts: list[int]) -> None:
    job_id, last = ended
    address = f"/v1/jobs/{job_id}/events/stream"
    for cut in cuts:
        answer = client.get(address, params={"after": 1}, headers={"last-event-id": str(cut)})
        if cut >= last:
            # A browser that is told 204 does not come back.
            assert (answer.status_code, answer.content) == (204, b"")
        else:
            assert numbers(answer.content) == list(range(cut + 1, last + 1))
            assert events_in(answer.content)[-1]["data"]["to"] == "succeeded"


@pytest.fixture
def ended(database: Database) -> tuple[str, int]:
    """A job with a history of several pages, and the number of its last event."""
    held = claim_job(database)
    report(database, held, 1, events=120)
    end(database, held)
    with database.transaction(write=False) as session:
        return held.job_id, job_snapshots(session, [held.job_id], worker_seconds=60)[held.job_id].event_seq


def test_a_stream_is_no_page_to_keep(client: TestClient, ended: tuple[str, int]) -> None:
    answer = client.get(f"/v1/jobs/{ended[0]}/events/stream")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert answer.text.startswith("retry: ")


def test_each_event_comes_once_whichever_process_is_asked_and_whenever_it_breaks(
    app: FastAPI, database: Database, other: FastAPI
) -> None:
    held = claim_job(database)

    async def follow() -> list[int]:
        seen: list[int] = []
        for round_ in range(1, 7):
            listener = Listener((app, other)[round_ % 2], held.job_id, after=seen[-1] if seen else 0)
            async with listening(listener):
                await asyncio.to_thread(report, database, held, round_, round_)
                total = 1 + sum(range(1, round_ + 1))
                await listener.has(b"id: %d\n" % total)
            seen += numbers(listener.content)
        last = Listener(app, held.job_id, after=seen[-1])
        async with listening(last) as task:
            await asyncio.to_thread(end, database, held)
            # By itself, since the job has ended.
            await task
        assert last.closed
        return seen + numbers(last.content)

    found = run(follow(), app.state.watcher)
    assert found == list(range(1, len(found) + 1))
    assert len(found) > 21


def test_a_quiet_stream_is_kept_alive_though_the_job_goes_on(app: FastAPI, database: Database) -> None:
    app.state.settings = app.state.settings.model_copy(update={"keep_alive_seconds": 0.05})
    held = claim_job(database)

    async def follow() -> bytes:
        listener = Listener(app, held.job_id)
        async with listening(listener):
            for number in range(1, 4):
                await asyncio.to_thread(write, database, held, [EventEnvelope(at=EPOCH, event=step_logged(1))], number)
            await listener.has(b": keep-alive\n\n" * 2)
        return listener.content

    assert run(follow(), app.state.watcher).count(b": keep-alive") >= 2


def test_who_does_not_read_costs_nothing_and_misses_nothing(app: FastAPI, database: Database) -> None:
    held = claim_job(database)
    report(database, held, 1, events=500)
    end(database, held)

    async def follow() -> tuple[int, list[int]]:
        listener = Listener(app, held.job_id)
        listener.reads.clear()
        with counted(database) as sent:
            task = asyncio.create_task(listener.listen())
            while not app.state.watcher.subscriptions:
                await asyncio.sleep(0)
            await app.state.watcher.snapshot(held.job_id)
            pages = sum("job_events" in statement for statement in sent)
        listener.reads.set()
        await task
        return pages, numbers(listener.content)

    pages, found = run(follow(), app.state.watcher)
    assert pages <= 1
    assert found == list(range(1, len(found) + 1))
    assert len(found) > 500


def test_those_who_go_away_and_the_service_that_stops_leave_nobody(app: FastAPI, database: Database) -> None:
    held = claim_job(database)

    async def follow() -> tuple[int, bool]:
        leaving, staying = Listener(app, held.job_id), Listener(app, held.job_id)
        async with listening(leaving), listening(staying) as task:
            await leaving.has(b"id: 1\n")
            await staying.has(b"id: 1\n")
            leaving.go_away()
            while app.state.watcher.subscriptions > 1:
                await asyncio.sleep(0)
            app.state.watcher.close()
            await task
        return app.state.watcher.subscriptions, staying.closed

    assert run(follow(), app.state.watcher) == (0, True)
