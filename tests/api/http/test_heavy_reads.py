"""Readers of much, and dry runs, delay neither lists nor polls nor each other."""

import asyncio
import threading
from typing import Any

import pytest
from fastapi import FastAPI
from httpx2 import Response
from sqlalchemy import event
from starlette.testclient import TestClient

from api.jobs.schemas import JobPage
from domain.db import Database
from tests.support.requests import send_concurrently, specification, start_get, submit


class BlockedStatements:
    """Statements that name a table wait until they are released."""

    def __init__(self, database: Database, table: str) -> None:
        self._table = table
        self._released = threading.Event()
        self.waiting = 0
        event.listen(database.engine, "before_cursor_execute", self._wait)

    def release(self) -> None:
        self._released.set()

    def _wait(self, _connection: Any, _cursor: Any, statement: str, *_others: Any) -> None:
        if self._table in statement and not self._released.is_set():
            self.waiting += 1
            assert self._released.wait(60)


@pytest.mark.parametrize(
    ("resource", "table"),
    [("metrics", "job_metrics"), ("events", "job_events"), ("logs", "job_attempts")],
    ids=["metrics", "events", "logs"],
)
def test_many_readers_of_a_long_history_delay_no_list_and_no_poll(
    app: FastAPI, client: TestClient, database: Database, dataset: str, resource: str, table: str
) -> None:
    job = submit(client, dataset)["id"]
    blocked = BlockedStatements(database, table)

    async def read() -> list[Response]:
        readers = [start_get(app, f"/v1/jobs/{job}/{resource}") for _ in range(30)]
        while not blocked.waiting:
            await asyncio.sleep(0)
        others = [await start_get(app, path) for path in ("/v1/jobs", f"/v1/jobs/{job}", "/v1/workers", "/readyz")]
        assert [response.status_code for response in others] == [200] * 4
        assert blocked.waiting < 5
        blocked.release()
        return await asyncio.gather(*readers)

    assert {response.status_code for response in asyncio.run(read())} == {200}


def test_a_list_is_rendered_once_for_each_state_of_a_job(client: TestClient, database: Database, dataset: str) -> None:
    jobs = [submit(client, dataset, name=f"job {number}")["id"] for number in range(3)]
    first = client.get("/v1/jobs")
    assert JobPage.model_validate_json(first.content).model_dump_json() == first.text
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    assert client.get("/v1/jobs").text == first.text
    assert sum("FROM jobs" in statement for statement in statements) == 1
    client.patch(f"/v1/jobs/{jobs[1]}", json={"name": "renamed", "priority": 7})
    changed = client.get("/v1/jobs", params={"limit": 2}).json()
    assert [(job["name"], job["priority"]) for job in changed["data"]] == [("job 2", 0), ("renamed", 7)]
    assert (changed["has_more"], changed["first_id"], changed["last_id"]) == (True, jobs[2], jobs[1])
    empty = client.get("/v1/jobs", params={"after": jobs[0]})
    assert empty.json() == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_dry_runs_that_wait_delay_no_reads(app: FastAPI, client: TestClient, database: Database, dataset: str) -> None:
    del client  # It has made the schema, and the data set.
    blocked = BlockedStatements(database, "FROM datasets")
    body = {"spec": specification(dataset)}

    async def plan() -> list[int]:
        plans = asyncio.create_task(send_concurrently(app, [("POST", "/v1/jobs/validate", {"json": body})] * 40))
        while not blocked.waiting:
            await asyncio.sleep(0)
        others = [await start_get(app, path) for path in ("/v1/jobs", "/v1/workers")]
        blocked.release()
        return [response.status_code for response in (*others, *await plans)]

    assert set(asyncio.run(plan())) == {200}
