"""The queue of a project among those of others."""

from typing import Any

from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs.leases import claim_next
from domain.workers.models import Device
from domain.workers.repository import register_worker
from tests.support.rows import add_job


def queue(client: TestClient, **query: int) -> dict[str, Any]:
    response = client.get("/v1/queue", params=query)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


def test_own_jobs_come_in_the_order_of_their_claims(client: TestClient, database: Database) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "w", [Device("cpu", "CPU", None)])
        for number in range(12):
            # Of two projects, with three priorities.
            add_job(session, project="default" if number % 2 else "other", priority=number % 3, name=f"job {number}")
    listed = queue(client)["data"]
    assert len(listed) == 6
    assert [job["position"] for job in listed] == sorted(job["position"] for job in listed)
    # Pages meet without a gap.
    paged: list[dict[str, Any]] = []
    while True:
        page = queue(client, limit=2, after=paged[-1]["position"] if paged else 0)
        paged += page["data"]
        if not page["has_more"]:
            break
    assert paged == listed
    for job in listed:
        shown = client.get(f"/v1/jobs/{job['id']}").json()["queue"]
        assert shown == {name: job[name] for name in shown}
    assert page["totals"] == {"queued": 12, "running": 0, "workers": 1, "workers_quarantined": 0}
    claimed = []
    for _ in range(12):
        with database.transaction(write=True) as session:
            claim = claim_next(session, worker="w", lease_seconds=60)
        assert claim is not None
        claimed += [claim.job_id] if claim.project == "default" else []
    assert claimed == [job["id"] for job in listed]
    empty = queue(client)
    assert (empty["data"], empty["first_id"], empty["totals"]["running"]) == ([], None, 12)


def test_a_job_says_why_it_waits(client: TestClient, database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session, device="cuda")
    assert queue(client)["data"][0]["reason"] == "no_worker"
    with database.transaction(write=True) as session:
        register_worker(session, "w", [Device("cpu", "CPU", None)])
    assert queue(client)["data"][0]["reason"] == "no_worker_fits"
