"""A POST with an `Idempotency-Key` does its work once, however often it is sent."""

import asyncio
from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from httpx2 import Response
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from api.datasets.upload import spool_directory
from api.idempotency import keys
from domain.db import Database
from domain.idempotency.models import MAX_BODY_BYTES, IdempotencyKey
from domain.settings import Settings
from tests.support.requests import (
    JSONL,
    expect_problem,
    http_scope,
    jsonl,
    pointers,
    send_concurrently,
    specification,
    submit,
    write_model,
)
from tests.support.waiting import eventually

KEY = {"idempotency-key": "one"}
CROWD = 50
DAY = 24 * 3600


def ids(client: TestClient, kind: str) -> list[str]:
    return [row["id"] for row in client.get(f"/v1/{kind}", params={"limit": 100}).json()["data"]]


def post_job(client: TestClient, dataset: str, headers: dict[str, str] = KEY, **fields: Any) -> Response:
    return client.post("/v1/jobs", json={"spec": specification(dataset)} | fields, headers=headers)


def post_rows(client: TestClient, content: Any, headers: dict[str, str] = KEY) -> Response:
    return client.post("/v1/datasets", content=content, headers=JSONL | headers)


def rows_of_keys(database: Database) -> list[IdempotencyKey]:
    with database.transaction(write=False) as session:
        return list(session.scalars(sa.select(IdempotencyKey)))


def let_pass(database: Database, seconds: float) -> None:
    """As if so many seconds had gone by for every key."""
    with database.transaction(write=True) as session:
        for row in session.scalars(sa.select(IdempotencyKey)):
            row.expires_at -= timedelta(seconds=seconds)


def assert_replay(answer: Response, first: Response) -> None:
    assert answer.headers.get("idempotent-replayed") == "true", answer.text
    assert "idempotent-replayed" not in first.headers
    for header in ("content-type", "location"):
        assert answer.headers.get(header) == first.headers.get(header)
    assert (answer.status_code, answer.content) == (first.status_code, first.content)


def test_a_job_is_made_once_and_the_first_answer_shown_again(client: TestClient, dataset: str) -> None:
    first = post_job(client, dataset)
    assert first.status_code == 201
    assert_replay(post_job(client, dataset), first)
    assert ids(client, "jobs") == [first.json()["id"]]
    assert client.get(first.headers["location"]).status_code == 200


def test_without_a_key_or_with_another_each_request_counts(client: TestClient, dataset: str) -> None:
    answers = [post_job(client, dataset, headers) for headers in ({}, {}, KEY, {"idempotency-key": "two"})]
    assert [answer.status_code for answer in answers] == [201] * 4
    assert len(ids(client, "jobs")) == 4


def test_rows_are_kept_once_and_the_first_answer_shown_again(
    client: TestClient, database: Database, settings: Settings
) -> None:
    first = post_rows(client, jsonl(5))
    assert first.status_code == 201
    # In other pieces it is the same request.
    assert_replay(post_rows(client, iter([jsonl(5)[:9], jsonl(5)[9:]])), first)
    assert ids(client, "datasets") == [first.json()["id"]]
    assert [path.name for path in (settings.artifact_root / "datasets").iterdir()] == [f"{first.json()['id']}.jsonl"]
    assert not any(spool_directory(settings).iterdir())
    assert [row.status for row in rows_of_keys(database)] == [201]


def test_a_form_is_the_same_request_although_its_boundary_is_another(client: TestClient) -> None:
    first, second = (
        client.post("/v1/datasets", files={"file": ("rows.jsonl", jsonl(2))}, headers=KEY) for _ in range(2)
    )
    assert first.request.headers["content-type"] != second.request.headers["content-type"]
    assert_replay(second, first)


def test_a_cancel_that_is_repeated_is_answered_as_the_first_was(client: TestClient, dataset: str) -> None:
    job = submit(client, dataset)["id"]
    first, second = (client.post(f"/v1/jobs/{job}/cancel", headers=KEY) for _ in range(2))
    assert first.status_code == 202
    assert_replay(second, first)


def test_an_ended_job_is_retried_once(client: TestClient, dataset: str) -> None:
    job = post_job(client, dataset, {}).json()["id"]
    client.post(f"/v1/jobs/{job}/cancel")
    first = client.post(f"/v1/jobs/{job}/retry", headers=KEY)
    assert first.status_code == 201
    assert_replay(client.post(f"/v1/jobs/{job}/retry", headers=KEY), first)
    assert sorted(ids(client, "jobs")) == sorted([job, first.json()["id"]])


def test_whatever_is_posted_may_be_repeated(client: TestClient) -> None:
    posts = {path: each["post"] for path, each in client.get("/openapi.json").json()["paths"].items() if "post" in each}
    keyed = {path for path, post in posts.items() if "Idempotency-Key" in str(post.get("parameters"))}
    # A dry run changes nothing.
    assert posts.keys() - keyed == {"/v1/jobs/validate"}
    assert {"/v1/jobs", "/v1/datasets", "/v1/jobs/{job_id}/branch", "/v1/workers/{name}/drain"} <= keyed


def test_a_key_belongs_to_one_request(client: TestClient, dataset: str) -> None:
    job = post_job(client, dataset).json()["id"]
    for answer in (
        post_job(client, dataset, priority=1),
        client.post(f"/v1/jobs/{job}/cancel", headers=KEY),
        post_rows(client, jsonl(1)),
    ):
        expect_problem(answer, 422, "idempotency_key_reused")
    assert ids(client, "jobs") == [job]
    assert client.get(f"/v1/jobs/{job}").json()["status"] == "queued"


@pytest.mark.parametrize("name", ["rows", "others"])
def test_rows_under_a_key_that_had_others(client: TestClient, name: str) -> None:
    made = post_rows(client, jsonl(5)).json()["id"]
    rows = jsonl(6) if name == "rows" else jsonl(5)
    answer = client.post("/v1/datasets", params={"name": name}, content=rows, headers=JSONL | KEY)
    expect_problem(answer, 422, "idempotency_key_reused")
    assert ids(client, "datasets") == [made]


def test_a_refusal_is_not_kept_because_nothing_was_done(client: TestClient, database: Database, dataset: str) -> None:
    expect_problem(post_job(client, "ds_00000000"), 422, "spec_invalid")
    expect_problem(post_rows(client, b"{}"), 422, "dataset_invalid")
    expect_problem(client.post("/v1/jobs/job_00000000/cancel", headers=KEY), 404, "job_not_found")
    assert rows_of_keys(database) == []
    assert post_job(client, dataset).status_code == 201


def test_a_full_queue_does_not_hide_what_was_answered(
    app: FastAPI, client: TestClient, settings: Settings, dataset: str
) -> None:
    app.state.settings = settings.model_copy(update={"max_jobs_queued": 1})
    first = post_job(client, dataset)
    expect_problem(post_job(client, dataset, {"idempotency-key": "two"}), 429, "quota_exceeded")
    assert_replay(post_job(client, dataset), first)


def test_a_commit_that_fails_keeps_neither_the_job_nor_its_answer(
    client: TestClient, database: Database, dataset: str
) -> None:
    def note(session: Session, _context: object) -> None:
        session.info["wrote"] = True

    def fail(session: Session) -> None:
        if "wrote" in session.info:
            raise OperationalError("COMMIT", {}, Exception("the database went away"))

    event.listen(Session, "after_flush", note)
    event.listen(Session, "before_commit", fail)
    try:
        expect_problem(post_job(client, dataset), 503, "unavailable")
    finally:
        event.remove(Session, "before_commit", fail)
        event.remove(Session, "after_flush", note)
    assert rows_of_keys(database) == []
    assert ids(client, "jobs") == []
    assert post_job(client, dataset).status_code == 201


def test_after_a_day_a_key_is_free_again(client: TestClient, database: Database, dataset: str) -> None:
    first = post_job(client, dataset)
    let_pass(database, DAY - 60)
    assert_replay(post_job(client, dataset), first)
    let_pass(database, 61)
    again = post_job(client, dataset, priority=1)
    assert again.status_code == 201
    assert again.json()["id"] != first.json()["id"]
    assert_replay(post_job(client, dataset, priority=1), again)


def test_the_largest_answer_that_a_job_can_have_is_kept(client: TestClient, settings: Settings, dataset: str) -> None:
    write_model(settings.home / "models" / "m", tokens={"a": 0, "b": 1}, layers=1024)
    spec = specification(dataset) | {
        "teacher": {"path": "./" * 511 + "m"},
        "student": {"from_teacher": {"layers": list(range(1024))}},
    }
    labels = {f"{n:0>63}": "\N{PILE OF POO}" * 200 for n in range(16)}
    first, second = (post_job(client, dataset, name="ä" * 200, labels=labels, spec=spec) for _ in range(2))
    assert first.status_code == 201, first.text
    assert_replay(second, first)
    assert len(first.content) < MAX_BODY_BYTES / 8


def test_an_answer_that_cannot_be_kept_is_refused_before_anything_is_done(
    client: TestClient, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_BODY_BYTES", 100)
    expect_problem(post_job(client, dataset), 422, "idempotency_answer_too_large")
    assert ids(client, "jobs") == []


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "\x7f", "é"])
def test_a_key_that_is_none_is_refused(bare: TestClient, key: str) -> None:
    for path in ("/v1/jobs", "/v1/jobs/job_00000000/cancel", "/v1/datasets"):
        answer = bare.post(path, json={"spec": {}}, headers={b"idempotency-key": key.encode("latin-1")})
        assert "/header/Idempotency-Key" in pointers(expect_problem(answer, 422, "invalid")), path


def test_two_keys_are_none(client: TestClient, dataset: str) -> None:
    answer = client.post("/v1/jobs", json={"spec": specification(dataset)}, headers=[*KEY.items(), *KEY.items()])
    assert pointers(expect_problem(answer, 422, "invalid")) == ["/header/Idempotency-Key"]


@pytest.mark.parametrize("key", ["x" * 255, "~ !", "'; DROP TABLE jobs; --", '"8e03978e-40d5"'])
def test_any_printable_key_is_one(client: TestClient, dataset: str, key: str) -> None:
    first, second = (post_job(client, dataset, {"idempotency-key": key}) for _ in range(2))
    assert_replay(second, first)


def test_of_a_crowd_of_equal_jobs_one_is_made(app: FastAPI, client: TestClient, dataset: str) -> None:
    body = {"json": {"spec": specification(dataset)}, "headers": KEY}
    answers = asyncio.run(send_concurrently(app, [("POST", "/v1/jobs", body)] * CROWD))
    assert Counter(answer.status_code for answer in answers) == {201: CROWD}
    assert len({answer.content for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
    assert ids(client, "jobs") == [answers[0].json()["id"]]


def test_of_a_crowd_of_equal_uploads_one_is_made(app: FastAPI, client: TestClient, settings: Settings) -> None:
    body = {"content": jsonl(5), "headers": JSONL | KEY}
    answers = asyncio.run(send_concurrently(app, [("POST", "/v1/datasets", body)] * CROWD))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert [a for a in answers if a.status_code == 201 and "idempotent-replayed" not in a.headers] != []
    (made,) = ids(client, "datasets")
    assert {answer.json()["id"] for answer in answers if answer.status_code == 201} == {made}
    for answer in answers:
        if answer.status_code == 409:
            assert expect_problem(answer, 409, "idempotency_in_progress")["retryable"] is True
            assert int(answer.headers["retry-after"]) > 0
    assert len(list((settings.artifact_root / "datasets").iterdir())) == 1
    assert not any(spool_directory(settings).iterdir())


def test_of_a_crowd_of_different_requests_under_one_key_one_is_served(
    app: FastAPI, client: TestClient, dataset: str
) -> None:
    bodies = [{"json": {"spec": specification(dataset), "priority": n}, "headers": KEY} for n in range(CROWD)]
    answers = asyncio.run(send_concurrently(app, [("POST", "/v1/jobs", body) for body in bodies]))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 422: CROWD - 1}
    assert len(ids(client, "jobs")) == 1


class Arriving:
    """An upload of which only a part has arrived."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._more = anyio.Event()
        self._asked = anyio.Event()
        self._pieces = [jsonl(5)[:20], jsonl(5)[20:]]
        self.broken = False
        self.status = 0

    async def run(self) -> None:
        scope = http_scope("POST", "/v1/datasets", JSONL | KEY)
        await self._app(scope, self._receive, self._send)

    async def half(self) -> None:
        """Wait until the service wants more."""
        await self._asked.wait()

    def go_on(self, *, broken: bool = False) -> None:
        self.broken = broken
        self._more.set()

    async def _receive(self) -> dict[str, Any]:
        if len(self._pieces) == 1:
            self._asked.set()
            await self._more.wait()
        if self.broken or not self._pieces:
            return {"type": "http.disconnect"}
        body = self._pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self._pieces)}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)


def test_an_upload_under_way_is_said_at_once_and_its_answer_shown_later(app: FastAPI, database: Database) -> None:
    again = ("POST", "/v1/datasets", {"content": jsonl(5), "headers": JSONL | KEY})

    async def run() -> tuple[Response, Response]:
        arriving = Arriving(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(arriving.run)
            await arriving.half()
            (early,) = await send_concurrently(app, [again])
            arriving.go_on()
        assert arriving.status == 201
        (late,) = await send_concurrently(app, [again])
        return early, late

    early, late = asyncio.run(run())
    expect_problem(early, 409, "idempotency_in_progress")
    assert late.status_code == 201
    assert late.headers["idempotent-replayed"] == "true"
    assert [row.status for row in rows_of_keys(database)] == [201]


def test_an_upload_that_breaks_off_frees_its_key(app: FastAPI, client: TestClient, database: Database) -> None:
    async def run() -> None:
        arriving = Arriving(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(arriving.run)
            await arriving.half()
            assert [row.status for row in rows_of_keys(database)] == [None]
            arriving.go_on(broken=True)

    asyncio.run(run())
    assert rows_of_keys(database) == []
    assert "idempotent-replayed" not in post_rows(client, jsonl(9)).headers


def test_an_upload_holds_its_key_for_as_long_as_it_takes(
    app: FastAPI, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "HOLD_SECONDS", 0.3)

    async def run() -> int:
        arriving = Arriving(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(arriving.run)
            await arriving.half()
            (before,) = rows_of_keys(database)
            beyond = before.expires_at + timedelta(seconds=0.5)
            held = partial(eventually, lambda: rows_of_keys(database)[0].expires_at > beyond, what="the key is held on")
            await anyio.to_thread.run_sync(held)
            arriving.go_on()
        return arriving.status

    assert asyncio.run(run()) == 201


def test_an_upload_that_lost_its_key_keeps_nothing(
    app: FastAPI, client: TestClient, database: Database, settings: Settings
) -> None:
    async def run() -> tuple[int, Response]:
        arriving = Arriving(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(arriving.run)
            await arriving.half()
            # As after a stall: its time is over, and another request has the key.
            let_pass(database, DAY)
            (other,) = await send_concurrently(
                app, [("POST", "/v1/datasets", {"content": jsonl(9), "headers": JSONL | KEY})]
            )
            arriving.go_on()
        return arriving.status, other

    lost, other = asyncio.run(run())
    assert (lost, other.status_code) == (422, 201)
    assert ids(client, "datasets") == [other.json()["id"]]
    assert len(list((settings.artifact_root / "datasets").iterdir())) == 1
