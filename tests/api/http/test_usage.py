"""What a project used, day by day, whatever becomes of its jobs."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs.leases import Claim, claim_next, reap_expired
from domain.jobs.models import JobAttempt
from domain.jobs.states import AttemptOutcome
from domain.jobs.usage import record_storage_today
from domain.usage.repository import AttemptUse
from tests.support.requests import expect_problem, pointers, upload
from tests.support.rows import add_job, insert_dataset
from tests.support.worker_actions import settle_attempt, succeed_job


def usage(client: TestClient, **query: str) -> dict[str, Any]:
    response = client.get("/v1/usage", params=query)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def claim_since(
    database: Database, seconds: float, *, device: str = "cpu", lease_seconds: float = 60, **columns: Any
) -> Claim:
    """Claim a new job as if that had been so many seconds ago."""
    with database.transaction(write=True) as session:
        add_job(session, device=device, **columns)
        claim = claim_next(session, worker="w", lease_seconds=lease_seconds)
        assert claim is not None
        began = datetime.now(UTC) - timedelta(seconds=seconds)
        session.execute(
            sa.update(JobAttempt)
            .where(JobAttempt.job_id == claim.job_id, JobAttempt.number == claim.token)
            .values(started_at=began)
        )
    return claim


def test_attempts_count_once_however_they_end_and_after_their_job_is_deleted(
    client: TestClient, database: Database
) -> None:
    succeed_job(database, claim := claim_since(database, 1000, device="cuda"))
    settle_attempt(database, claim_since(database, 500), AttemptOutcome.released())
    claim_since(database, 300, lease_seconds=-1)
    with database.transaction(write=True) as session:
        assert len(reap_expired(session)) == 1
    running = usage(client)["totals"]
    assert running["gpu_seconds"] == pytest.approx(1000, abs=60)
    assert running["cpu_seconds"] == pytest.approx(800, abs=60)
    with database.transaction(write=True) as session:
        # One that runs counts up to now.
        again = claim_next(session, worker="w", lease_seconds=60)
        assert again is not None
        session.execute(
            sa.update(JobAttempt)
            .where(JobAttempt.job_id == again.job_id, JobAttempt.number == again.token)
            .values(started_at=datetime.now(UTC) - timedelta(seconds=100))
        )
    assert usage(client)["totals"]["cpu_seconds"] == pytest.approx(900, abs=60)
    before = usage(client)["totals"]["gpu_seconds"]
    assert client.delete(f"/v1/jobs/{claim.job_id}").status_code == 204
    assert usage(client)["totals"]["gpu_seconds"] == before


def test_projects_see_their_own_usage(client: TestClient, database: Database) -> None:
    succeed_job(database, claim_since(database, 1000, project="other"))
    claim_since(database, 1000, project="other")
    with database.transaction(write=True) as session:
        insert_dataset(session, project="other")
        record_storage_today(session)
    body = usage(client)
    assert (body["days"], body["storage_bytes"], body["project"]) == ([], 0, "default")
    upload(client)
    assert usage(client)["storage_bytes"] == client.get("/v1/datasets").json()["data"][0]["size_bytes"]


def test_the_storage_of_a_day_is_the_most_of_it(client: TestClient, database: Database) -> None:
    dataset = upload(client, rows=50)
    with database.transaction(write=True) as session:
        record_storage_today(session)
    most = usage(client)["storage_bytes"]
    assert client.delete(f"/v1/datasets/{dataset}").status_code == 204
    upload(client, rows=1)
    with database.transaction(write=True) as session:
        record_storage_today(session)
    body = usage(client)
    assert body["storage_bytes"] < most
    assert body["days"][0]["storage_bytes"] == most


def test_the_range_of_days_is_checked(client: TestClient) -> None:
    for query in ({"since": "2026-01-02", "until": "2026-01-01"}, {"since": "2020-01-01", "until": "2026-01-01"}):
        problem = expect_problem(client.get("/v1/usage", params=query), 422, "invalid")
        assert pointers(problem) == ["/query/since"]
    # Not seconds since 1970, nor moments.
    for text in ("0", "1e3", "2026-01-01T00:00:00", "\uff12\uff10\uff12\uff16-01-01"):
        problem = expect_problem(client.get("/v1/usage", params={"until": text}), 422, "invalid")
        assert pointers(problem) == ["/query/until"]
    assert usage(client, until="0001-01-05")["since"] == "0001-01-01"
    assert usage(client, since="2026-01-01", until="2026-01-01")["days"] == []


moments = st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 9), timezones=st.just(UTC))


@given(started=moments, ended=moments)
def test_seconds_of_an_attempt_are_split_at_midnight(started: datetime, ended: datetime) -> None:
    use = AttemptUse("p", "job", 1, "w", "cpu", started)
    by_day = dict(use.by_day(ended))
    assert sum(by_day.values()) == pytest.approx(max(0.0, (ended - started).total_seconds()))
    assert all(seconds == 86_400 for day, seconds in by_day.items() if started.date() < day < ended.date())
    assert all(started.date() <= day <= ended.date() for day in by_day)
