"""Idempotent requests: a POST with an `Idempotency-Key` does its work once, however often it is sent."""

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
from domain.connections import KIND_OPTION
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
REQUESTS = 50
DAY = 24 * 3600


def ids(client: TestClient, kind: str) -> list[str]:
    return [row["id"] for row in client.get(f"/v1/{kind}", params={"limit": 100}).json()["data"]]


def post_job(client: TestClient, dataset: str, headers: dict[str, str] = KEY, **fields: Any) -> Response:
    return client.post("/v1/jobs", json={"spec": specification(dataset)} | fields, headers=headers)


def post_samples(client: TestClient, content: Any, headers: dict[str, str] = KEY) -> Response:
    return client.post("/v1/datasets", content=content, headers=JSONL | headers)


def stored_keys(database: Database) -> list[IdempotencyKey]:
    with database.transaction(write=False) as session:
        return list(session.scalars(sa.select(IdempotencyKey)))


def advance_clock(database: Database, seconds: float) -> None:
    """Let all keys expire so many seconds earlier."""
    with database.transaction(write=True) as session:
        for row in session.scalars(sa.select(IdempotencyKey)):
            row.expires_at -= timedelta(seconds=seconds)


def assert_replay(response: Response, first: Response) -> None:
    assert response.headers.get("idempotent-replayed") == "true", response.text
    assert "idempotent-replayed" not in first.headers
    for header in ("content-type", "location"):
        assert response.headers.get(header) == first.headers.get(header)
    assert (response.status_code, response.content) == (first.status_code, first.content)


def test_a_duplicate_submission_creates_one_job_and_is_replayed(client: TestClient, dataset: str) -> None:
    first = post_job(client, dataset)
    assert first.status_code == 201
    assert_replay(post_job(client, dataset), first)
    assert ids(client, "jobs") == [first.json()["id"]]
    assert client.get(first.headers["location"]).status_code == 200


def test_requests_without_a_key_or_under_other_keys_are_independent(client: TestClient, dataset: str) -> None:
    responses = [post_job(client, dataset, headers) for headers in ({}, {}, KEY, {"idempotency-key": "two"})]
    assert [response.status_code for response in responses] == [201] * 4
    assert len(ids(client, "jobs")) == 4


def test_a_duplicate_upload_is_stored_once_and_is_replayed(
    client: TestClient, database: Database, settings: Settings
) -> None:
    first = post_samples(client, jsonl(5))
    assert first.status_code == 201
    # Sent in other chunks, it is the same request.
    assert_replay(post_samples(client, iter([jsonl(5)[:9], jsonl(5)[9:]])), first)
    assert ids(client, "datasets") == [first.json()["id"]]
    assert [path.name for path in (settings.artifact_root / "datasets").iterdir()] == [f"{first.json()['id']}.jsonl"]
    assert not any(spool_directory(settings).iterdir())
    assert [row.status for row in stored_keys(database)] == [201]


def test_a_form_with_another_boundary_is_a_duplicate(client: TestClient) -> None:
    first, second = (
        client.post("/v1/datasets", files={"file": ("rows.jsonl", jsonl(2))}, headers=KEY) for _ in range(2)
    )
    assert first.request.headers["content-type"] != second.request.headers["content-type"]
    assert_replay(second, first)


def test_a_duplicate_cancel_is_replayed(client: TestClient, dataset: str) -> None:
    job = submit(client, dataset)["id"]
    first, second = (client.post(f"/v1/jobs/{job}/cancel", headers=KEY) for _ in range(2))
    assert first.status_code == 202
    assert_replay(second, first)


def test_a_duplicate_retry_creates_one_job(client: TestClient, dataset: str) -> None:
    job = post_job(client, dataset, {}).json()["id"]
    client.post(f"/v1/jobs/{job}/cancel")
    first = client.post(f"/v1/jobs/{job}/retry", headers=KEY)
    assert first.status_code == 202
    assert_replay(client.post(f"/v1/jobs/{job}/retry", headers=KEY), first)
    assert sorted(ids(client, "jobs")) == sorted([job, first.json()["id"]])


def test_every_post_but_dry_runs_new_secrets_and_conversations_takes_a_key(client: TestClient) -> None:
    posts = {path: each["post"] for path, each in client.get("/openapi.json").json()["paths"].items() if "post" in each}
    keyed = {path for path, post in posts.items() if "Idempotency-Key" in str(post.get("parameters"))}
    dry_runs = {"/v1/jobs/validate", "/v1/retention/preview"}
    # The answer of these is kept nowhere.
    new_secrets = {"/v1/keys", "/v1/keys/{key_id}/rotate", "/v1/keys/{key_id}/revoke"}
    # A client that is gone cancels its answer, and whoever asks again wants another.
    conversations = {path for path in posts if path.endswith("/chat/completions")}
    assert posts.keys() - keyed == dry_runs | new_secrets | conversations
    assert {"/v1/jobs", "/v1/datasets", "/v1/jobs/{job_id}/branch", "/v1/workers/{name}/drain"} <= keyed


def test_a_key_reused_for_another_request_is_refused(client: TestClient, dataset: str) -> None:
    job = post_job(client, dataset).json()["id"]
    for response in (
        post_job(client, dataset, priority=1),
        client.post(f"/v1/jobs/{job}/cancel", headers=KEY),
        post_samples(client, jsonl(1)),
    ):
        expect_problem(response, 422, "idempotency_key_reused")
    assert ids(client, "jobs") == [job]
    assert client.get(f"/v1/jobs/{job}").json()["status"] == "queued"


@pytest.mark.parametrize("name", ["rows", "others"])
def test_a_key_reused_for_another_upload_is_refused(client: TestClient, name: str) -> None:
    dataset_id = post_samples(client, jsonl(5)).json()["id"]
    rows = jsonl(6) if name == "rows" else jsonl(5)
    response = client.post("/v1/datasets", params={"name": name}, content=rows, headers=JSONL | KEY)
    expect_problem(response, 422, "idempotency_key_reused")
    assert ids(client, "datasets") == [dataset_id]


def test_an_error_response_is_not_stored(client: TestClient, database: Database, dataset: str) -> None:
    expect_problem(post_job(client, "ds_00000000"), 422, "spec_invalid")
    expect_problem(post_samples(client, b"{}"), 422, "dataset_invalid")
    expect_problem(client.post("/v1/jobs/job_00000000/cancel", headers=KEY), 404, "job_not_found")
    assert stored_keys(database) == []
    assert post_job(client, dataset).status_code == 201


def test_a_duplicate_is_replayed_although_the_queue_is_full(
    app: FastAPI, client: TestClient, settings: Settings, dataset: str
) -> None:
    app.state.settings = settings.model_copy(update={"max_jobs_queued": 1})
    first = post_job(client, dataset)
    expect_problem(post_job(client, dataset, {"idempotency-key": "two"}), 429, "quota_exceeded")
    assert_replay(post_job(client, dataset), first)


def test_a_failed_commit_stores_neither_the_job_nor_its_response(
    client: TestClient, database: Database, dataset: str
) -> None:
    def fail(session: Session) -> None:
        if session.connection().get_execution_options()[KIND_OPTION] == "write":
            raise OperationalError("COMMIT", {}, Exception("the database went away"))

    event.listen(Session, "before_commit", fail)
    try:
        expect_problem(post_job(client, dataset), 503, "unavailable")
    finally:
        event.remove(Session, "before_commit", fail)
    assert stored_keys(database) == []
    assert ids(client, "jobs") == []
    assert post_job(client, dataset).status_code == 201


def test_after_a_day_a_key_is_free_again(client: TestClient, database: Database, dataset: str) -> None:
    first = post_job(client, dataset)
    advance_clock(database, DAY - 60)
    assert_replay(post_job(client, dataset), first)
    advance_clock(database, 61)
    retried = post_job(client, dataset, priority=1)
    assert retried.status_code == 201
    assert retried.json()["id"] != first.json()["id"]
    assert_replay(post_job(client, dataset, priority=1), retried)


def test_the_largest_response_of_a_job_is_stored(client: TestClient, settings: Settings, dataset: str) -> None:
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


def test_a_response_too_large_to_store_is_refused_and_nothing_is_done(
    client: TestClient, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_BODY_BYTES", 100)
    expect_problem(post_job(client, dataset), 422, "idempotency_answer_too_large")
    assert ids(client, "jobs") == []


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "\x7f", "é"])
def test_an_invalid_key_is_refused(client: TestClient, key: str) -> None:
    for path in ("/v1/jobs", "/v1/jobs/job_00000000/cancel", "/v1/datasets"):
        response = client.post(path, json={"spec": {}}, headers={b"idempotency-key": key.encode("latin-1")})
        assert "/header/Idempotency-Key" in pointers(expect_problem(response, 422, "invalid")), path


def test_two_keys_are_refused(client: TestClient, dataset: str) -> None:
    response = client.post("/v1/jobs", json={"spec": specification(dataset)}, headers=[*KEY.items(), *KEY.items()])
    assert pointers(expect_problem(response, 422, "invalid")) == ["/header/Idempotency-Key"]


@pytest.mark.parametrize("key", ["x" * 255, "~ !", "'; DROP TABLE jobs; --", '"8e03978e-40d5"'])
def test_any_printable_key_is_accepted(client: TestClient, dataset: str, key: str) -> None:
    first, second = (post_job(client, dataset, {"idempotency-key": key}) for _ in range(2))
    assert_replay(second, first)


def test_concurrent_duplicate_submissions_create_one_job(app: FastAPI, client: TestClient, dataset: str) -> None:
    body = {"json": {"spec": specification(dataset)}, "headers": KEY}
    responses = asyncio.run(send_concurrently(app, [("POST", "/v1/jobs", body)] * REQUESTS))
    assert Counter(response.status_code for response in responses) == {201: REQUESTS}
    assert len({response.content for response in responses}) == 1
    assert [response.headers.get("idempotent-replayed") for response in responses].count(None) == 1
    assert ids(client, "jobs") == [responses[0].json()["id"]]


def test_concurrent_duplicate_uploads_create_one_data_set(app: FastAPI, client: TestClient, settings: Settings) -> None:
    body = {"content": jsonl(5), "headers": JSONL | KEY}
    responses = asyncio.run(send_concurrently(app, [("POST", "/v1/datasets", body)] * REQUESTS))
    assert {response.status_code for response in responses} <= {201, 409}
    assert [a for a in responses if a.status_code == 201 and "idempotent-replayed" not in a.headers] != []
    (dataset_id,) = ids(client, "datasets")
    assert {response.json()["id"] for response in responses if response.status_code == 201} == {dataset_id}
    for response in responses:
        if response.status_code == 409:
            assert expect_problem(response, 409, "idempotency_in_progress")["retryable"] is True
            assert int(response.headers["retry-after"]) > 0
    assert len(list((settings.artifact_root / "datasets").iterdir())) == 1
    assert not any(spool_directory(settings).iterdir())


def test_of_concurrent_requests_that_reuse_a_key_one_is_served(app: FastAPI, client: TestClient, dataset: str) -> None:
    bodies = [{"json": {"spec": specification(dataset), "priority": n}, "headers": KEY} for n in range(REQUESTS)]
    responses = asyncio.run(send_concurrently(app, [("POST", "/v1/jobs", body) for body in bodies]))
    assert Counter(response.status_code for response in responses) == {201: 1, 422: REQUESTS - 1}
    assert len(ids(client, "jobs")) == 1


class SlowUpload:
    """An upload that stops in the middle of its body until it is resumed."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._resumed = anyio.Event()
        self._receiving = anyio.Event()
        self._pieces = [jsonl(5)[:20], jsonl(5)[20:]]
        self.disconnect = False
        self.status = 0

    async def run(self) -> None:
        scope = http_scope("POST", "/v1/datasets", JSONL | KEY)
        await self._app(scope, self._receive, self._send)

    async def reach_middle(self) -> None:
        """Wait until the service has received the first part of the body."""
        await self._receiving.wait()

    def resume(self, *, disconnect: bool = False) -> None:
        self.disconnect = disconnect
        self._resumed.set()

    async def _receive(self) -> dict[str, Any]:
        if len(self._pieces) == 1:
            self._receiving.set()
            await self._resumed.wait()
        if self.disconnect or not self._pieces:
            return {"type": "http.disconnect"}
        body = self._pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self._pieces)}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)


def test_a_duplicate_of_an_upload_in_progress_conflicts_and_is_replayed_later(app: FastAPI, database: Database) -> None:
    duplicate = ("POST", "/v1/datasets", {"content": jsonl(5), "headers": JSONL | KEY})

    async def run() -> tuple[Response, Response]:
        upload = SlowUpload(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upload.run)
            await upload.reach_middle()
            (early,) = await send_concurrently(app, [duplicate])
            upload.resume()
        assert upload.status == 201
        (late,) = await send_concurrently(app, [duplicate])
        return early, late

    early, late = asyncio.run(run())
    expect_problem(early, 409, "idempotency_in_progress")
    assert late.status_code == 201
    assert late.headers["idempotent-replayed"] == "true"
    assert [row.status for row in stored_keys(database)] == [201]


def test_a_disconnected_upload_releases_its_key(app: FastAPI, client: TestClient, database: Database) -> None:
    async def run() -> None:
        upload = SlowUpload(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upload.run)
            await upload.reach_middle()
            assert [row.status for row in stored_keys(database)] == [None]
            upload.resume(disconnect=True)

    asyncio.run(run())
    assert stored_keys(database) == []
    assert "idempotent-replayed" not in post_samples(client, jsonl(9)).headers


def test_a_slow_upload_extends_the_hold_on_its_key(
    app: FastAPI, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "HOLD_SECONDS", 0.3)

    async def run() -> int:
        upload = SlowUpload(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upload.run)
            await upload.reach_middle()
            (before,) = stored_keys(database)
            beyond = before.expires_at + timedelta(seconds=0.5)
            extended = partial(
                eventually, lambda: stored_keys(database)[0].expires_at > beyond, what="the hold on the key is extended"
            )
            await anyio.to_thread.run_sync(extended)
            upload.resume()
        return upload.status

    assert asyncio.run(run()) == 201


def test_an_upload_that_lost_its_key_stores_nothing(
    app: FastAPI, client: TestClient, database: Database, settings: Settings
) -> None:
    async def run() -> tuple[int, Response]:
        upload = SlowUpload(app)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upload.run)
            await upload.reach_middle()
            # As after a stall: the hold has expired, and another request takes the key.
            advance_clock(database, DAY)
            (other,) = await send_concurrently(
                app, [("POST", "/v1/datasets", {"content": jsonl(9), "headers": JSONL | KEY})]
            )
            upload.resume()
        return upload.status, other

    status, other = asyncio.run(run())
    assert (status, other.status_code) == (422, 201)
    assert ids(client, "datasets") == [other.json()["id"]]
    assert len(list((settings.artifact_root / "datasets").iterdir())) == 1
