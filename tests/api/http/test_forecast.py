"""What a job will take: in the dry run and in the job, by the workers that there are and what they have done."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs.models import JobAttempt
from domain.workers.models import Device
from domain.workers.repository import quarantine, register_worker
from tests.support.requests import specification, submit
from tests.support.worker_actions import claim_queued_job, succeed_job


def dry_run(client: TestClient, dataset: str, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs/validate", json={"spec": specification(dataset, **fields)})
    assert response.status_code == 200, response.text
    plan: dict[str, Any] = response.json()
    return plan


def add_worker(database: Database, name: str, *devices: Device) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, name, devices)


CPU, GPU = Device("cpu", "Xeon", 1 << 40), Device("cuda", "H100", 1 << 40)


def test_an_assumption_is_named_until_a_job_has_ended(client: TestClient, database: Database, dataset: str) -> None:
    add_worker(database, "w1", CPU)
    assumed = dry_run(client, dataset)["forecast"]["duration"]
    assert (assumed["basis"], assumed["past_jobs"], assumed["device"]) == ("assumption", 0, "cpu")
    assert 0 < assumed["low_seconds"] < assumed["expected_seconds"] < assumed["high_seconds"]
    job = submit(client, dataset)
    assert job["forecast"]["duration"] == assumed
    claim = claim_queued_job(database)
    with database.transaction(write=True) as session:
        session.execute(
            sa.update(JobAttempt)
            .where(JobAttempt.job_id == claim.job_id)
            .values(started_at=datetime.now(UTC) - timedelta(seconds=1000), device="cpu")
        )
    succeed_job(database, claim)
    learnt = dry_run(client, dataset)["forecast"]["duration"]
    assert (learnt["basis"], learnt["past_jobs"]) == ("past_jobs", 1)
    assert learnt["expected_seconds"] == pytest.approx(1000, abs=60)
    assert learnt["low_seconds"] < 900 < 1100 < learnt["high_seconds"]
    # Devices of another name have not done it.
    add_worker(database, "w2", GPU)
    on_gpu = dry_run(client, dataset, resources={"device": "cuda"})["forecast"]["duration"]
    assert (on_gpu["basis"], on_gpu["device"]) == ("assumption", "cuda")


def test_workers_that_the_job_fits_are_counted(client: TestClient, database: Database, dataset: str) -> None:
    def fit(**fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = dry_run(client, dataset, **fields)["forecast"]["fit"]
        return found

    assert fit() == {"state": "no_worker", "workers": 0, "able": 0}
    add_worker(database, "w1", Device("cpu", "Xeon", 1000))
    assert fit() == {"state": "no_worker_fits", "workers": 1, "able": 0}
    add_worker(database, "w2", CPU)
    assert fit() == {"state": "fits", "workers": 2, "able": 1}
    assert fit(resources={"device": "cuda"}) == {"state": "no_worker_fits", "workers": 2, "able": 0}
    with database.transaction(write=True) as session:
        quarantine(session, "w2", "sick", wait=lambda _: 60)
    assert fit() == {"state": "workers_quarantined", "workers": 1, "able": 0}


def test_a_price_needs_a_rate_and_a_gpu(app: FastAPI, client: TestClient, database: Database, dataset: str) -> None:
    add_worker(database, "w1", CPU, GPU)
    assert dry_run(client, dataset)["forecast"]["price"] is None
    assert client.get("/v1/usage").json()["cost"] is None
    app.state.settings = app.state.settings.model_copy(update={"price_per_gpu_hour": 7200.0, "price_currency": "EUR"})
    forecast = dry_run(client, dataset)["forecast"]
    assert forecast["price"] == {
        "low": pytest.approx(2 * forecast["duration"]["low_seconds"], abs=1e-3),
        "expected": pytest.approx(2 * forecast["duration"]["expected_seconds"], abs=1e-3),
        "high": pytest.approx(2 * forecast["duration"]["high_seconds"], abs=1e-3),
        "currency": "EUR",
        "per_gpu_hour": 7200.0,
    }
    assert dry_run(client, dataset, resources={"device": "cpu"})["forecast"]["price"] is None
    assert client.get("/v1/usage").json()["cost"] == {"amount": 0, "currency": "EUR", "per_gpu_hour": 7200.0}


def test_too_little_disk_is_warned_of(client: TestClient, dataset: str) -> None:
    plan = dry_run(client, dataset)
    disk = plan["forecast"]["disk"]
    assert (disk["needed_bytes"], disk["fits"]) == (plan["estimate"]["stored_bytes"], True)
    # Each stage keeps its training state there, and a run two alone.
    assert plan["estimate"]["stored_bytes"] > plan["estimate"]["disk_bytes"]
    assert "disk_space_low" not in {warning["code"] for warning in plan["warnings"]}
    layers = {"layers": 48, "hidden_size": 4096}
    large = dry_run(client, dataset, student={"random": layers}, teacher={"random": layers}, checkpoints={"keep": 100})
    disk = large["forecast"]["disk"]
    assert disk["needed_bytes"] > 10 * (1 << 40)
    assert disk["fits"] == (disk["free_bytes"] >= disk["needed_bytes"])
    assert ("disk_space_low" in {warning["code"] for warning in large["warnings"]}) == (not disk["fits"])


def test_a_job_whose_models_are_elsewhere_has_no_duration(client: TestClient, dataset: str) -> None:
    hub = {"hub": {"repo": "acme/model"}}
    plan = dry_run(client, dataset, teacher=hub, student=hub)
    assert (plan["estimate"], plan["forecast"]["duration"], plan["forecast"]["disk"]["fits"]) == (None, None, None)
