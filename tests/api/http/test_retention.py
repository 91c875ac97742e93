"""The retention policy of a project over HTTP, its preview, and what a job has in its place."""

from typing import Any

import sqlalchemy as sa
from starlette.testclient import TestClient

from domain.db import Database, db_now
from domain.jobs.models import Job
from domain.jobs.states import AttemptOutcome
from domain.retention.models import RetentionPolicy
from domain.retention.repository import set_policy
from tests.support.requests import expect_problem, pointers, specification, submit
from tests.support.rows import save_checkpoint
from tests.support.worker_actions import claim_queued_job, settle_attempt

DEFAULTS = {
    "object": "retention_policy",
    "checkpoint_days": None,
    "keep_last": 1,
    "keep_best": True,
    "history_days": None,
    "job_days": None,
    "dataset_days": None,
}


def test_a_policy_is_set_whole_and_read_back(client: TestClient, database: Database) -> None:
    with database.transaction(write=True) as session:
        set_policy(session, "theirs", RetentionPolicy(job_days=1))
    assert client.get("/v1/retention").json() == DEFAULTS
    assert client.put("/v1/retention", json={"job_days": 9, "keep_last": 2}).status_code == 200
    set_again = client.put("/v1/retention", json={"checkpoint_days": 30, "keep_last": 0, "dataset_days": 0})
    expected = DEFAULTS | {"checkpoint_days": 30, "keep_last": 0, "dataset_days": 0}
    assert set_again.json() == client.get("/v1/retention").json() == expected


WRONG: tuple[dict[str, Any], ...] = (
    {"job_days": -1},
    {"job_days": 1.5},
    {"job_days": "9"},
    {"keep_best": 1},
    {"keep_last": 10**9},
    {"keep": 1},
)


def test_a_wrong_policy_is_refused_by_field(client: TestClient, dataset: str) -> None:
    for field in WRONG:
        (name,) = field
        assert pointers(expect_problem(client.put("/v1/retention", json=field), 422, "invalid")) == [f"/{name}"]
        refused = client.post("/v1/jobs", json={"spec": specification(dataset), "retention": field})
        assert pointers(expect_problem(refused, 422, "invalid")) == [f"/retention/{name}"]
    assert client.get("/v1/retention").json() == DEFAULTS


def test_a_preview_says_what_would_go_and_deletes_nothing(client: TestClient, database: Database, dataset: str) -> None:
    jobs = [submit(client, dataset, retention=own)["id"] for own in (None, {"job_days": None}, None)]
    for _ in range(2):
        claim = claim_queued_job(database)
        state = save_checkpoint(database, claim, "stage", 9, size_bytes=30)
        kept = save_checkpoint(database, claim, "final", 9, size_bytes=10)
        settle_attempt(database, claim, AttemptOutcome.succeeded())
        with database.transaction(write=True) as session:
            session.execute(sa.update(Job).where(Job.id == claim.job_id).values(finished_at=db_now(-86_400 * 5)))
    policy = {"job_days": 5, "checkpoint_days": 5, "history_days": 4}
    shown = client.post("/v1/retention/preview", json=policy).json()
    assert shown["jobs"] == [
        {"job_id": jobs[0], "whole": True, "history": False, "checkpoints": [], "size_bytes": 40},
        {"job_id": jobs[1], "whole": False, "history": True, "checkpoints": [state.id], "size_bytes": 30},
    ]
    assert (shown["size_bytes"], shown["has_more"], shown["last_id"]) == (70, False, jobs[1])
    assert client.post("/v1/retention/preview", params={"after": jobs[0]}, json=policy).json()["size_bytes"] == 30
    assert client.post("/v1/retention/preview").json()["jobs"] == []
    client.put("/v1/retention", json=policy)
    assert client.post("/v1/retention/preview").json()["size_bytes"] == 70
    shown = client.get("/v1/checkpoints").json()["data"]
    assert len(shown) == 4
    # Of the second job, which has no limit of its own days, the student stays.
    assert [each["id"] for each in shown if each["expires_at"] is None] == [kept.id]
    for each in shown:
        assert client.get(f"/v1/checkpoints/{each['id']}").json() == each
        assert each in client.get(f"/v1/jobs/{each['job_id']}/checkpoints").json()["data"]
    assert client.post(f"/v1/checkpoints/{state.id}/pin").json()["expires_at"] is None


def test_a_job_has_its_own_retention_from_its_submission_or_later(client: TestClient, dataset: str) -> None:
    job = submit(client, dataset, retention={"job_days": 3, "keep_best": False})
    address = f"/v1/jobs/{job['id']}"
    assert job["retention"] == {"job_days": 3, "keep_best": False}
    assert client.patch(address, json={"name": "x"}).json()["retention"] == {"job_days": 3, "keep_best": False}
    assert client.patch(address, json={"retention": {"job_days": None}}).json()["retention"] == {"job_days": None}
    client.post(f"{address}/cancel")
    # An ended job too: that is what it is for.
    assert client.patch(address, json={"retention": {"history_days": 1}}).json()["retention"] == {"history_days": 1}
    kept = client.post(f"{address}/retry").json()
    other = client.post(f"{address}/retry", json={"retention": None}).json()
    assert (kept["retention"], other["retention"]) == ({"history_days": 1}, None)
    assert client.patch(address, json={"retention": {}}).json()["retention"] is None
