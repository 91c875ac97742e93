"""Repeated requests to services that share a database, and to one that is killed at its commit."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from domain.db import Database, db_now
from domain.idempotency.models import IdempotencyKey
from tests.support.api_process import serving
from tests.support.requests import AUTHORIZED, JSONL, jsonl, specification

REQUESTS = 50
DYING_SERVICE = ("-m", "tests.integration.dying_service")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home that all services of this module share."""
    home = tmp_path_factory.mktemp("services") / "home"
    home.mkdir(mode=0o700)
    return home


@pytest.fixture(scope="module")
def survivor(home: Path, backend: str, shared_database_url: str) -> Iterator[str]:
    """The address of a service that runs on when others die."""
    with serving(home, home.parent / f"log-{backend}", database_url=shared_database_url) as served:
        yield served.address


@pytest.fixture
def key() -> dict[str, str]:
    """An `Idempotency-Key` header that no other test sends."""
    return {"idempotency-key": uuid.uuid4().hex}


def ids_at(address: str, kind: str) -> list[str]:
    answer = httpx2.get(f"{address}/v1/{kind}", params={"limit": 100}, headers=AUTHORIZED)
    return [row["id"] for row in answer.json()["data"]]


def new_ids(address: str, kind: str, before: list[str]) -> list[str]:
    """The ids that are not in `before`."""
    return [row for row in ids_at(address, kind) if row not in before]


def upload(address: str, headers: dict[str, str] | None = None) -> httpx2.Response:
    return httpx2.post(f"{address}/v1/datasets", content=jsonl(8), headers=JSONL | AUTHORIZED | (headers or {}))


async def post_concurrently(addresses: list[str], path: str, **fields: Any) -> list[httpx2.Response]:
    limits = httpx2.Limits(max_connections=REQUESTS)
    async with httpx2.AsyncClient(headers=AUTHORIZED, timeout=120, limits=limits) as client:
        sent = (client.post(f"{addresses[n % len(addresses)]}{path}", **fields) for n in range(REQUESTS))
        return await asyncio.gather(*sent)


def test_one_of_many_equal_requests_at_two_services_does_the_work(
    home: Path, survivor: str, key: dict[str, str], shared_database_url: str, tmp_path: Path
) -> None:
    with serving(home, tmp_path / "log", database_url=shared_database_url) as second:
        addresses = [survivor, second.address]
        jobs, datasets = ids_at(survivor, "jobs"), ids_at(survivor, "datasets")
        dataset = upload(survivor).json()["id"]
        body = {"spec": specification(dataset)}
        answers = asyncio.run(post_concurrently(addresses, "/v1/jobs", json=body, headers=key))
        assert Counter(answer.status_code for answer in answers) == {201: REQUESTS}
        assert len({answer.content for answer in answers}) == 1
        assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
        assert new_ids(second.address, "jobs", jobs) == [answers[0].json()["id"]]
        rows = {"content": jsonl(9), "headers": JSONL | {"idempotency-key": f"rows-{key['idempotency-key']}"}}
        answers = asyncio.run(post_concurrently(addresses, "/v1/datasets", **rows))
        assert {answer.status_code for answer in answers} <= {201, 409}
        (other,) = {answer.json()["id"] for answer in answers if answer.status_code == 201}
        assert sorted(new_ids(survivor, "datasets", datasets)) == sorted([dataset, other])


@pytest.mark.parametrize("moment", ["before", "after"])
def test_job_submission_is_repeatable_after_a_kill_at_its_commit(
    home: Path, survivor: str, key: dict[str, str], shared_database_url: str, tmp_path: Path, moment: str
) -> None:
    jobs = ids_at(survivor, "jobs")
    with serving(
        home, tmp_path / "dying", program=(*DYING_SERVICE, moment), expects_kill=True, database_url=shared_database_url
    ) as dying:
        dataset = upload(dying.address).json()["id"]
        body = {"spec": specification(dataset)}
        with pytest.raises(httpx2.TransportError):
            httpx2.post(f"{dying.address}/v1/jobs", json=body, headers=key | AUTHORIZED)
    created = new_ids(survivor, "jobs", jobs)
    assert len(created) == (moment == "after")
    answer = httpx2.post(f"{survivor}/v1/jobs", json=body, headers=key | AUTHORIZED)
    assert answer.status_code == 201
    assert answer.headers.get("idempotent-replayed") == ("true" if moment == "after" else None)
    assert new_ids(survivor, "jobs", jobs) == (created or [answer.json()["id"]])


@pytest.mark.parametrize("moment", ["before", "after"])
def test_upload_is_repeatable_after_a_kill_at_its_commit(
    home: Path, survivor: str, key: dict[str, str], shared_database_url: str, tmp_path: Path, moment: str
) -> None:
    datasets = ids_at(survivor, "datasets")
    with (
        serving(
            home,
            tmp_path / "dying",
            program=(*DYING_SERVICE, moment),
            expects_kill=True,
            database_url=shared_database_url,
        ) as dying,
        pytest.raises(httpx2.TransportError),
    ):
        upload(dying.address, key)
    created = new_ids(survivor, "datasets", datasets)
    assert len(created) == (moment == "after")
    if moment == "before":
        # The service does not know yet whether the first one still receives.
        assert upload(survivor, key).json()["code"] == "idempotency_in_progress"
        let_hold_run_out(shared_database_url)
    answer = upload(survivor, key)
    assert answer.status_code == 201
    assert answer.headers.get("idempotent-replayed") == ("true" if moment == "after" else None)
    assert new_ids(survivor, "datasets", datasets) == [answer.json()["id"]]


def let_hold_run_out(database_url: str) -> None:
    database = Database(database_url)
    with database.transaction(write=True) as session:
        session.execute(sa.update(IdempotencyKey).values(expires_at=db_now()))
    database.close()
