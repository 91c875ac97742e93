"""Conditional and long polls of a job: a client that waits holds nothing, and misses no change."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs import actions
from domain.jobs.leases import claim_next
from domain.jobs.models import Job
from domain.settings import Settings
from domain.workers.models import Device
from domain.workers.repository import register_worker
from tests.support.requests import expect_problem, pointers, start_get
from tests.support.rows import add_job, claim_job, envelopes, step_logged
from tests.support.watchers import recorded_queries, run_and_close
from tests.support.worker_actions import succeed_job, write_events

TIMEOUT_SECONDS = 60


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"watch_seconds": 0.005, "max_followers": 3})


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
    succeed_job(database, claim)
    assert client.get(address, params={"wait": TIMEOUT_SECONDS}).json()["status"] == "succeeded"


@pytest.mark.parametrize("conditional", [True, False])
def test_a_long_poll_returns_on_a_change_by_another_process(
    app: FastAPI, database: Database, other_app: FastAPI, conditional: bool
) -> None:
    claim = claim_job(database)
    address = f"/v1/jobs/{claim.job_id}"

    async def wait() -> httpx2.Response:
        first = await start_get(app, address)
        headers = {"if-none-match": first.headers["etag"]} if conditional else {}
        waiting = start_get(app, f"{address}?wait={TIMEOUT_SECONDS}", headers)
        while not app.state.watcher.subscriptions:
            await asyncio.sleep(0)
        await asyncio.to_thread(write_events, other_app.state.database, claim, envelopes(step_logged(1)), offset=1)
        response: httpx2.Response = await waiting
        return response

    response = run_and_close(wait(), app.state.watcher)
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


def test_the_fast_path_answers_as_the_router_does(client: TestClient, database: Database) -> None:
    def same(client: TestClient, path: str, headers: dict[str, str]) -> httpx2.Response:
        responses = [client.get(path, params=params, headers=headers) for params in ({}, {"wait": 0})]
        plain, waiting = ([response.status_code, _without_request_id(response)] for response in responses)
        assert plain == waiting
        return responses[0]

    known = f"/v1/jobs/{claim_job(database).job_id}"
    etag = same(client, known, {}).headers["etag"]
    assert same(client, known, {"if-none-match": etag}).status_code == 304
    assert same(client, "/v1/jobs/job_00000000", {}).status_code == 404
    assert same(client, known, {"authorization": "Bearer another"}).status_code == 401


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
        waiting = []
        for client in ("10.0.0.1", "10.0.0.1", "10.0.0.2"):
            waiting.append(start_get(app, f"/v1/jobs/{job_id}?wait={TIMEOUT_SECONDS}", client=client))
            while app.state.watcher.subscriptions < len(waiting):
                await asyncio.sleep(0)
            if len(waiting) == 2:
                # The first client has as many as are free, and more: the last is for others.
                greedy = [await start_get(app, f"/v1/jobs/{job_id}{path}", client=client) for path in following]
        refused = [await start_get(app, f"/v1/jobs/{job_id}{path}", client="10.0.0.3") for path in following]
        app.state.watcher.close()
        return greedy + refused + [await each for each in waiting]

    following = ("?wait=1", "/events/stream")
    responses = run_and_close(exceed_limit(), app.state.watcher)
    for refused in responses[:2]:
        expect_problem(refused, 429, "client_share_exceeded")
    for refused in responses[2:4]:
        expect_problem(refused, 503, "too_many_followers")
    for refused in responses[:4]:
        assert refused.json()["retryable"] is True
        assert refused.headers["retry-after"]
    assert [response.status_code for response in responses[4:]] == [200] * 3
