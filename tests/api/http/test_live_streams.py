"""Progress, metrics and logs in an event stream: nothing durable is lost or doubled, and real clients read it."""

import asyncio
import json
from typing import Any
from urllib.parse import urlencode

import httpx
import httpx_sse
import jsonschema
import pytest
import sseclient
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.jobs.event_schemas import StreamEventType, message_schemas
from domain.db import Database
from domain.jobs.engine_logs import MAX_CHUNK_BYTES, LogChunk, append_log
from domain.jobs.leases import Claim
from domain.jobs.states import AttemptOutcome
from domain.settings import Settings
from pocl.events import Warned
from tests.api.http.test_streaming import StreamClient, listening
from tests.support.requests import expect_problem, pointers
from tests.support.rows import claim_job, envelopes, stage_started, step_logged
from tests.support.watchers import recorded_queries, run_and_close
from tests.support.worker_actions import claim_queued_job, settle_attempt, succeed_job, write_events

ALL = {"types": [each.value for each in StreamEventType]}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"watch_seconds": 0.005})


def add_log(database: Database, claim: Claim, *texts: str, start: int = 0, max_bytes: int = 1 << 20) -> int:
    """Add lines to the log of an attempt, each as a chunk of its own; the size of the log then."""
    chunks = []
    for text in texts:
        chunks.append(LogChunk(start, text.encode()))
        start += len(text.encode())
    with database.transaction(write=True) as session:
        append_log(session, claim, chunks, max_bytes=max_bytes)
    return start


@pytest.fixture
def ended(database: Database) -> Claim:
    """A job of two attempts with a history, metrics of 12 steps and logs."""
    first = claim_job(database)
    write_events(database, first, envelopes(stage_started(0), *map(step_logged, range(1, 9))), offset=1)
    add_log(database, first, "loading\n", "käse\n", "step 8\n")
    settle_attempt(database, first, AttemptOutcome.released())
    second = claim_queued_job(database)
    warned = Warned(code="w", message="x\u2028y\n")
    write_events(database, second, envelopes(warned, *map(step_logged, range(5, 13))), offset=1)
    add_log(database, second, "again\n", "done\n")
    succeed_job(database, second)
    return second


def messages(content: str) -> list[tuple[str | None, str, dict[str, Any]]]:
    """Id, type and data of each message, as the WHATWG's standard parses a stream."""
    parsed = []
    for block in content.removeprefix("retry: 2000\n").split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        parsed.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return parsed


def test_a_stream_has_all_types_in_order_and_its_end_last(client: TestClient, ended: Claim) -> None:
    parsed = messages(client.get(f"/v1/jobs/{ended.job_id}/events/stream", params=ALL).text)
    assert {type_ for _, type_, _ in parsed} == {"state", "stage", "warning", "metric", "log", "end"}
    assert [type_ for _, type_, _ in parsed].index("end") == len(parsed) - 1
    assert [data["step"] for _, type_, data in parsed if type_ == "metric"] == list(range(1, 13))
    values = next(data["values"] for _, type_, data in parsed if type_ == "metric")
    assert (values["loss"], values["tokens_seen"]) == (2.0, 150.0)
    texts: dict[int, str] = {}
    for _, type_, data in parsed:
        if type_ == "log":
            assert data["offset"] == len(texts.get(data["attempt"], "").encode())
            texts[data["attempt"]] = texts.get(data["attempt"], "") + data["text"]
            assert data["next_offset"] == len(texts[data["attempt"]].encode())
    assert texts == {1: "loading\nkäse\nstep 8\n", 2: "again\ndone\n"}
    history = client.get(f"/v1/jobs/{ended.job_id}/events").json()["data"]
    assert [data for _, type_, data in parsed if type_ not in ("metric", "log")] == history


@given(data=st.data())
@hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resumed_stream_is_the_uninterrupted_one(client: TestClient, ended: Claim, data: st.DataObject) -> None:
    durable = st.sampled_from(sorted(set(StreamEventType) - {StreamEventType.PROGRESS}))
    types = {"types": [each.value for each in data.draw(st.lists(durable, unique=True, min_size=1))]}
    address = f"/v1/jobs/{ended.job_id}/events/stream"
    whole = messages(client.get(address, params=types).text)
    received: list[tuple[str | None, str, dict[str, Any]]] = []
    while not received or received[-1][1] != "end":
        headers = {"last-event-id": received[-1][0] or ""} if received else {}
        rest = messages(client.get(address, params=types, headers=headers).text)
        received += rest[: data.draw(st.integers(1, len(rest)))]
    assert received == whole
    assert client.get(address, params=types, headers={"last-event-id": received[-1][0] or ""}).status_code == 204


def test_wrong_types_and_positions_are_refused(client: TestClient, database: Database) -> None:
    address = f"/v1/jobs/{claim_job(database).job_id}/events/stream"
    problem = expect_problem(client.get(address, params={"types": "tokens"}), 422, "invalid")
    assert pointers(problem) == ["/query/types/0"]
    for wrong in ("1.2", "1.2.3", "1.2.3.4.5", "1.2.3.x", f"1.{2**31}.0.0", f"1.1.{2**61}.0", ""):
        problem = expect_problem(client.get(address, headers={"last-event-id": wrong}), 422, "invalid")
        assert pointers(problem) == ["/header/Last-Event-ID"], wrong


def test_progress_comes_at_once_and_at_most_once_a_second(app: FastAPI, database: Database) -> None:
    claim = claim_job(database)

    async def follow() -> str:
        client = StreamClient(app, claim.job_id, query="types=progress&types=metric")
        async with listening(client):
            await client.receive_until(b"event: progress\n")
            for step in range(1, 11):
                await asyncio.to_thread(write_events, database, claim, envelopes(step_logged(step)), offset=step)
            await client.receive_until(b'"step":10,')
        return client.content.decode()

    parsed = messages(run_and_close(follow(), app.state.watcher))
    progress = [(id_, data) for id_, type_, data in parsed if type_ == "progress"]
    assert [id_ for id_, _ in progress] == [None] * len(progress)
    # Ten reports in less than a second or two, depending on the machine: not each has a message.
    assert len(progress) < 8
    shown = progress[0][1]
    assert (shown["status"], shown["progress"]["total_steps"], shown["eta"]) == ("preparing", 20, None)
    assert [data["step"] for _, type_, data in parsed if type_ == "metric"] == list(range(1, 11))


def test_followers_of_many_jobs_share_one_query(app: FastAPI, database: Database) -> None:
    claims = [claim_job(database) for _ in range(10)]

    async def follow() -> list[str]:
        clients = [StreamClient(app, claim.job_id, query="types=progress") for claim in claims for _ in range(5)]
        tasks = [asyncio.create_task(client.listen()) for client in clients]
        for client in clients:
            await client.receive_until(b"event: progress\n")
        with recorded_queries(database) as queries:
            await asyncio.to_thread(write_events, database, claims[0], envelopes(step_logged(3)), offset=1)
            await clients[0].receive_until(b'"step":3,')
        for client in clients:
            client.disconnect()
        await asyncio.gather(*tasks)
        return queries

    queries = run_and_close(follow(), app.state.watcher)
    about_progress = [each for each in queries if "tokens_per_second" in each and "log_bytes" in each]
    assert about_progress
    assert all(" IN " in each for each in about_progress if "FOR UPDATE" not in each and "lease_token" not in each)


def test_a_follower_of_the_log_goes_on_with_the_next_attempt(app: FastAPI, database: Database) -> None:
    claim = claim_job(database)
    add_log(database, claim, "one\n", "two\n")

    async def follow() -> tuple[str, str]:
        client = StreamClient(app, claim.job_id, path="logs", query="follow=true&tail=4")
        async with listening(client):
            await client.receive_until(b"two")
            await asyncio.to_thread(add_log, database, claim, "three\n", start=8)
            await client.receive_until(b"three")
            await asyncio.to_thread(settle_attempt, database, claim, AttemptOutcome.released())
            again = await asyncio.to_thread(claim_queued_job, database)
            await asyncio.to_thread(add_log, database, again, "four\n")
            await client.receive_until(b"four")
        content = client.content.decode()
        last = messages(content)[-1][0]
        resumed = StreamClient(app, claim.job_id, path="logs", query="follow=true", after=last)
        async with listening(resumed) as task:
            await asyncio.to_thread(add_log, database, again, "five\n", start=5)
            await asyncio.to_thread(succeed_job, database, again)
            await task
        return content, resumed.content.decode()

    first, second = (messages(content) for content in run_and_close(follow(), app.state.watcher))
    logged = [(data["attempt"], data["offset"], data["text"]) for _, type_, data in first if type_ == "log"]
    assert logged == [(1, 4, "two\n"), (1, 8, "three\n"), (2, 0, "four\n")]
    assert [type_ for _, type_, _ in second] == ["log", "end"]
    assert second[0][2]["text"] == "five\n"


# --- Parts of a log -------------------------------------------------------------------------------------


@given(data=st.data())
@hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_a_log_join_to_the_whole(client: TestClient, database: Database, data: st.DataObject) -> None:
    lines = data.draw(st.lists(st.text(max_size=30).map(lambda text: f"{text}\n"), min_size=1, max_size=8))
    whole = "".join(lines).encode()
    claim = claim_job(database)
    add_log(database, claim, *lines)
    address = f"/v1/jobs/{claim.job_id}/logs"
    read, offset = b"", 0
    while True:
        response = client.get(address, params={"offset": offset, "limit": data.draw(st.integers(1, 40))})
        headers = response.headers
        assert (headers["log-attempt"], headers["log-size"], headers["log-first-offset"]) == ("1", str(len(whole)), "0")
        assert int(headers["log-offset"]) == offset
        if not response.content:
            break
        read += response.content
        offset = int(headers["log-next-offset"])
    assert read == whole
    tail = data.draw(st.integers(0, len(whole) + 5))
    response = client.get(address, params={"tail": tail})
    assert response.content == whole[int(response.headers["log-offset"]) :]
    begin = int(response.headers["log-offset"])
    assert len(response.content) <= max(tail, 0) or begin == 0
    # It begins with a line, unless the only line is longer than the tail.
    assert begin == 0 or whole[begin - 1 : begin] == b"\n" or b"\n" not in whole[begin - 1 : -1]


def test_a_dropped_beginning_is_told(client: TestClient, database: Database) -> None:
    claim = claim_job(database)
    size = add_log(database, claim, *(f"line {number:03}\n" for number in range(100)), max_bytes=50)
    response = client.get(f"/v1/jobs/{claim.job_id}/logs", params={"offset": 0})
    assert int(response.headers["log-offset"]) == int(response.headers["log-first-offset"]) > 800
    assert response.text.startswith("line 09")
    # Whole chunks are dropped, each of which is a line here.
    assert 50 <= len(response.content) < 50 + len("line 000\n")
    assert int(response.headers["log-size"]) == size
    beyond = client.get(f"/v1/jobs/{claim.job_id}/logs", params={"offset": size + 1000})
    assert (beyond.text, beyond.headers["log-next-offset"]) == ("", str(size))
    problem = expect_problem(
        client.get(f"/v1/jobs/{claim.job_id}/logs", params={"offset": 0, "tail": 1}), 422, "invalid"
    )
    assert pointers(problem) == ["/query/tail"]


def test_chunks_that_are_there_already_change_nothing(client: TestClient, database: Database) -> None:
    claim = claim_job(database)
    for _ in range(2):
        size = add_log(database, claim, "one\n", "x" * MAX_CHUNK_BYTES)
    response = client.get(f"/v1/jobs/{claim.job_id}/logs", params={"offset": 0})
    assert len(response.content) == size == int(response.headers["log-size"])
    assert client.get(f"/v1/jobs/{claim.job_id}/logs", params={"offset": 4, "limit": 3}).text == "xxx"


# --- The clients that people use ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["httpx-sse", "sseclient-py"])
def test_the_usual_clients_read_every_message(app: FastAPI, database: Database, name: str) -> None:
    app.state.settings = app.state.settings.model_copy(update={"keep_alive_seconds": 0.02})
    claim = claim_job(database)

    async def follow() -> bytes:
        client = StreamClient(app, claim.job_id, query=urlencode(ALL, doseq=True))
        async with listening(client) as task:
            await client.receive_until(b": keep-alive\n: keep-alive\n")
            await asyncio.to_thread(write_events, database, claim, envelopes(stage_started(0)), offset=1)
            await client.receive_until(b"event: stage")
            await asyncio.to_thread(add_log, database, claim, "a\u2028b\n\n", "data: x\n\n")
            await asyncio.to_thread(succeed_job, database, claim)
            await task
        return client.content

    content = run_and_close(follow(), app.state.watcher)
    # In pieces, as a network cuts them.
    pieces = (content[start : start + 7] for start in range(0, len(content), 7))
    read: list[tuple[str, Any]]
    if name == "httpx-sse":
        response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=pieces)
        read = [(each.event, json.loads(each.data)) for each in httpx_sse.EventSource(response).iter_sse()]
    else:
        read = [(each.event, json.loads(each.data)) for each in sseclient.SSEClient(pieces).events()]
    assert [each[0] for each in read if each[0] != "progress"] == ["state", "state", "stage", "log", "log", "end"]
    assert [data["text"] for type_, data in read if type_ == "log"] == ["a\u2028b\n\n", "data: x\n\n"]


def test_every_message_fits_the_schema_of_its_type(client: TestClient, ended: Claim) -> None:
    schemas = message_schemas()
    stream = json.loads(
        json.dumps({"$defs": schemas, **schemas["StreamMessage"]}).replace("#/components/schemas/", "#/$defs/")
    )
    validator = jsonschema.Draft202012Validator(stream)
    parsed = messages(client.get(f"/v1/jobs/{ended.job_id}/events/stream", params=ALL).text)
    assert len({data["type"] for _, _, data in parsed}) >= 5
    for _, _, data in parsed:
        validator.validate(data)
