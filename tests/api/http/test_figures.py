"""The figures of `/metrics` are those of the rows, on each database."""

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from api.scrape.figures_cache import FiguresCache
from domain.db import Database
from domain.ids import new_id
from domain.jobs.leases import claim_next, settle
from domain.jobs.models import Job
from domain.jobs.states import AttemptOutcome, EndReason
from domain.monitoring.figures import MAX_PROJECTS, OTHER_PROJECTS
from domain.settings import Settings
from domain.workers.models import Device, GpuFigures
from domain.workers.repository import LEADER, record_scheduler, register_worker, take_duty
from tests.support.requests import submit
from tests.support.scrapes import scrape, value


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Every scrape reads the figures anew."""
    return settings.model_copy(update={"metrics_cache_seconds": 0.0, "max_jobs_queued": 1000})


def run_one(database: Database, outcome: AttemptOutcome) -> None:
    with database.transaction(write=True) as session:
        claim = claim_next(session, worker="w1", lease_seconds=60)
    assert claim is not None
    with database.transaction(write=True) as session:
        settle(session, claim, outcome)


def test_figures_are_those_of_the_rows(client: TestClient, database: Database, dataset: str) -> None:
    first = submit(client, dataset)["id"]
    with database.transaction(write=True) as session:
        row = session.get_one(Job, first)
        alike = {"posted_spec": row.posted_spec, "spec": row.spec}
        session.execute(sa.insert(Job), [{"id": new_id("job"), **alike} for _ in range(3)])
    sick = EndReason("device_unavailable", "The GPU is gone.", "system", True)
    run_one(database, AttemptOutcome.succeeded())
    run_one(database, AttemptOutcome.failed(EndReason("spec_invalid", "No.", "user", False)))
    run_one(database, AttemptOutcome.failed(sick))
    with database.transaction(write=True) as session:
        register_worker(session, "w1", [Device("cpu", "CPU", None)])
        gpu = GpuFigures("GPU-1", "NVIDIA L4", memory_bytes=24 << 30, memory_used_bytes=1 << 30, utilization=0.5)
        register_worker(session, "w2", [Device("cuda", "NVIDIA L4", 24 << 30, "GPU-1")], gpu_figures=[gpu])
        # The next heartbeat need not say it again.
        register_worker(session, "w2", [Device("cuda", "NVIDIA L4", 24 << 30, "GPU-1")])
        record_scheduler(session, "s1", reaches_broker=True)
        claim_next(session, worker="w1", lease_seconds=60)
    assert value(scrape(client), "pocl_scheduler_leaders") == 0
    with database.transaction(write=True) as session:
        take_duty(session, LEADER, "s1", seconds=600)
    families = scrape(client)
    assert value(families, "pocl_scheduler_leaders") == 1
    assert value(families, "pocl_jobs", project="default", status="queued") == 1
    assert value(families, "pocl_jobs", project="default", status="preparing") == 1
    oldest = value(families, "pocl_queue_oldest_seconds", project="default")
    assert oldest is not None
    assert 0 <= oldest < 300
    assert value(families, "pocl_jobs_ended_total", status="succeeded", fault="none", code="succeeded") == 1
    assert value(families, "pocl_jobs_ended_total", status="failed", fault="user", code="spec_invalid") == 1
    assert value(families, "pocl_attempts_ended_total", end="succeeded", fault="none", code="succeeded") == 1
    assert value(families, "pocl_attempts_ended_total", end="failed", fault="user", code="spec_invalid") == 1
    assert value(families, "pocl_attempts_ended_total", end="failed", fault="system", code="device_unavailable") == 1
    assert value(families, "pocl_workers", state="busy") == 1
    assert value(families, "pocl_workers", state="idle") == 1
    assert value(families, "pocl_workers", state="lost") == 0
    assert value(families, "pocl_schedulers", reaches_broker="true") == 1
    assert value(families, "pocl_gpu_memory_used_bytes", uuid="GPU-1", name="NVIDIA L4") == 1 << 30
    assert value(families, "pocl_gpu_utilization_ratio", uuid="GPU-1", name="NVIDIA L4") == 0.5
    # What the driver does not say is left out.
    assert value(families, "pocl_gpu_temperature_celsius", uuid="GPU-1", name="NVIDIA L4") is None
    assert value(families, "pocl_webhook_endpoints", status="enabled") == 0
    assert value(families, "pocl_webhook_deliveries_pending") == 0
    assert value(families, "pocl_publications", state="pending") == 0
    stored = value(families, "pocl_stored_bytes", kind="datasets")
    assert stored is not None
    assert stored > 0


def test_ends_stay_counted_when_their_jobs_are_deleted(client: TestClient, dataset: str) -> None:
    job = submit(client, dataset)["id"]
    client.post(f"/v1/jobs/{job}/cancel")
    before = scrape(client)
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    labels = {"status": "cancelled", "fault": "user", "code": "cancelled"}
    assert value(before, "pocl_jobs_ended_total", **labels) == 1
    assert value(scrape(client), "pocl_jobs_ended_total", **labels) == 1


def test_projects_beyond_the_limit_are_added_up(client: TestClient, database: Database) -> None:
    projects = [f"p{number:02}" for number in range(MAX_PROJECTS + 5)]
    with database.transaction(write=True) as session:
        session.execute(
            sa.insert(Job),
            [{"id": new_id("job"), "project": each, "posted_spec": {}, "spec": {}} for each in [*projects, "p00"]],
        )
    samples = scrape(client)["pocl_jobs"].samples
    queued = {each.labels["project"]: each.value for each in samples if each.labels["status"] == "queued"}
    assert len(queued) == MAX_PROJECTS + 1
    assert queued[OTHER_PROJECTS] == 5
    assert queued["p00"] == 2
    assert sum(queued.values()) == len(projects) + 1


def test_figures_that_cannot_be_read_are_left_out_and_logged(client: TestClient, app: FastAPI) -> None:
    def fail() -> None:
        raise RuntimeError("a row that nobody expected")

    app.state.table_figures = FiguresCache(fail, seconds=0)
    with capture_logs() as lines:
        families = scrape(client)
    assert "pocl_stored_bytes" not in families
    assert value(families, "pocl_database_up") == 1
    assert [(line["event"], line["log_level"]) for line in lines] == [("figures_not_read", "error")]
