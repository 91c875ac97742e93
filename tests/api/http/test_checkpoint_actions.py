"""Checkpoints of a project: listed, pinned and deleted; what is gone is said to be gone."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs.leases import Claim
from domain.jobs.states import RUNTIME_EXCEEDED, AttemptOutcome
from pocl.storage.manifest import write_manifest
from tests.support.requests import expect_problem, specification, submit
from tests.support.rows import claim_job, save_checkpoint
from tests.support.worker_actions import claim_queued_job, settle_attempt


@pytest.fixture
def claim(client: TestClient, database: Database, dataset: str) -> Claim:
    submit(client, dataset)
    return claim_queued_job(database)


@pytest.fixture
def stored(app: FastAPI, database: Database, claim: Claim, tmp_path: Path) -> dict[str, str]:
    """The ids of the checkpoints of an ended job, by kind, with their files in the store."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_manifest(tmp_path / "model")
    ids = {}
    for stage, kind in enumerate(("stage", "best", "final")):
        row = save_checkpoint(database, claim, kind, 10 * (stage + 1), stage=stage)  # type: ignore[arg-type] # Literals.
        app.state.store.publish(tmp_path / "model", row.store_key)
        ids[kind] = row.id
    settle_attempt(database, claim, AttemptOutcome.failed(RUNTIME_EXCEEDED))
    return ids


def listed(client: TestClient, **filters: Any) -> list[str]:
    response = client.get("/v1/checkpoints", params=filters)
    assert response.status_code == 200, response.text
    return [each["id"] for each in response.json()["data"]]


def test_the_projects_checkpoints_are_listed_by_job_stage_kind_and_pin(
    client: TestClient, database: Database, claim: Claim, stored: dict[str, str]
) -> None:
    theirs = save_checkpoint(database, claim_job(database, project="theirs"), "final", 1)
    assert client.post(f"/v1/checkpoints/{stored['best']}/pin").json()["pinned"] is True
    assert listed(client) == [stored["final"], stored["best"], stored["stage"]]
    assert listed(client, job=claim.job_id, limit=1, after=stored["final"]) == [stored["best"]]
    assert listed(client, job=theirs.job_id) == []
    assert listed(client, stage=0) == [stored["stage"]]
    assert listed(client, kind=["stage", "final"]) == [stored["final"], stored["stage"]]
    assert listed(client, pinned=True) == [stored["best"]]
    assert listed(client, pinned=False) == [stored["final"], stored["stage"]]
    for wrong in ({"kind": "worst"}, {"pinned": "perhaps"}, {"stage": -1}, {"job": "\0"}, {"jobs": "x"}):
        expect_problem(client.get("/v1/checkpoints", params=wrong), 422, "invalid")


def test_a_deleted_checkpoint_is_gone_everywhere_and_its_files_too(
    client: TestClient, app: FastAPI, claim: Claim, stored: dict[str, str], dataset: str
) -> None:
    address = f"/v1/checkpoints/{stored['best']}"
    assert app.state.store.list_keys(f"jobs/{claim.job_id}/attempt-1") != []
    before = client.get(f"/v1/jobs/{claim.job_id}").json()["stored_bytes"]
    assert client.delete(address).status_code == 204
    for gone in (
        client.get(address),
        client.delete(address),
        client.get(f"{address}/manifest"),
        client.get(f"{address}/files/config.json"),
        client.post(f"{address}/pin"),
    ):
        problem = expect_problem(gone, 410, "checkpoint_expired")
        assert problem["detail"].startswith("A client deleted the checkpoint at ")
        assert problem["retryable"] is False
    refused = client.post("/v1/jobs", json={"spec": specification(dataset, teacher={"checkpoint": stored["best"]})})
    (error,) = expect_problem(refused, 422, "spec_invalid")["errors"]
    assert (error["pointer"], error["code"]) == ("/spec/teacher/checkpoint", "checkpoint_expired")
    assert stored["best"] not in listed(client)
    assert not any("best" in key for key in app.state.store.list_keys(f"jobs/{claim.job_id}/attempt-1"))
    assert client.get(f"/v1/jobs/{claim.job_id}").json()["stored_bytes"] == before - 1


def test_what_is_pinned_or_needed_is_not_deleted(
    client: TestClient, app: FastAPI, claim: Claim, stored: dict[str, str]
) -> None:
    final = f"/v1/checkpoints/{stored['final']}"
    for _ in range(2):
        assert client.post(f"{final}/pin").status_code == 200
    expect_problem(client.delete(final), 409, "checkpoint_is_pinned")
    expect_problem(client.delete(f"/v1/jobs/{claim.job_id}"), 409, "job_is_needed")
    assert client.post(f"{final}/unpin").json()["pinned"] is False
    retry = client.post(f"/v1/jobs/{claim.job_id}/retry").json()["id"]
    refused = client.delete(f"/v1/checkpoints/{stored['stage']}")
    assert retry in expect_problem(refused, 409, "checkpoint_is_needed")["detail"]
    assert client.delete(final).status_code == 204
    assert len(app.state.store.list_keys(f"jobs/{claim.job_id}/attempt-1")) == 2


def test_an_unknown_checkpoint_can_be_neither_deleted_nor_pinned(client: TestClient, database: Database) -> None:
    theirs = save_checkpoint(database, claim_job(database, project="theirs"), "final", 1).id
    for unknown in ("ckpt_00000000000000000000000000", theirs, "x"):
        expect_problem(client.delete(f"/v1/checkpoints/{unknown}"), 404, "checkpoint_not_found")
        for action in ("pin", "unpin"):
            expect_problem(client.post(f"/v1/checkpoints/{unknown}/{action}"), 404, "checkpoint_not_found")


def test_a_repeated_pin_with_its_key_is_replayed(client: TestClient, stored: dict[str, str]) -> None:
    address, headers = f"/v1/checkpoints/{stored['final']}/pin", {"Idempotency-Key": "pin it"}
    first = client.post(address, headers=headers)
    assert client.post(f"/v1/checkpoints/{stored['final']}/unpin").json()["pinned"] is False
    again = client.post(address, headers=headers)
    assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")
    assert listed(client, pinned=True) == []
