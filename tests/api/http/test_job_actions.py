"""Pausing, resuming, retrying, branching, changing and deleting jobs over HTTP, and the workers behind them."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs.event_recorder import add_checkpoint
from domain.jobs.leases import settle
from domain.jobs.retries import RetryPolicy
from domain.jobs.states import AttemptOutcome, EndReason
from domain.workers.models import Device
from domain.workers.repository import quarantine, register_worker
from tests.support.requests import expect_problem, pointers, specification, submit
from tests.support.rows import envelopes, step_logged
from tests.support.worker_actions import claim_queued_job, settle_attempt, succeed_job, write_events

BROKEN = EndReason("loss_diverged", "The loss is not finite.", "user", False, "Lower it.")


def failed_with_stage(client: TestClient, database: Database, dataset: str) -> str:
    """A job that finished its first stage and then failed."""
    job = submit(client, dataset, name="first", labels={"team": "nlp"}, priority=7)
    claim = claim_queued_job(database)
    with database.transaction(write=True) as session:
        add_checkpoint(
            session, claim, kind="stage", step=1, stage=0, store_key=f"jobs/{job['id']}/attempt-1/stage-00000001",
            size_bytes=10, manifest_sha256="0" * 64,
        )  # fmt: skip
    settle_attempt(database, claim, AttemptOutcome.failed(BROKEN))
    return str(job["id"])


def test_pause_and_resume_are_idempotent(client: TestClient, database: Database, dataset: str) -> None:
    job = submit(client, dataset)["id"]
    refused = expect_problem(client.post(f"/v1/jobs/{job}/pause"), 409, "illegal_transition")
    assert refused["allowed"] == ["cancel"]
    claim = claim_queued_job(database)
    pausing = client.post(f"/v1/jobs/{job}/pause", json={"at": "stage_end"})
    assert (pausing.status_code, pausing.json()["status"], pausing.json()["pause_at"]) == (202, "pausing", "stage_end")
    assert client.post(f"/v1/jobs/{job}/pause", json={"at": "stage_end"}).status_code == 200
    expect_problem(client.post(f"/v1/jobs/{job}/resume"), 409, "illegal_transition")
    settle_attempt(database, claim, AttemptOutcome.released())
    assert client.get(f"/v1/jobs/{job}").json()["status"] == "paused"
    resumed = client.post(f"/v1/jobs/{job}/resume")
    assert (resumed.status_code, resumed.json()["status"]) == (202, "queued")
    assert client.post(f"/v1/jobs/{job}/resume").status_code == 200


def test_an_ended_job_is_retried_as_a_new_one(client: TestClient, database: Database, dataset: str) -> None:
    job = failed_with_stage(client, database, dataset)
    response = client.post(f"/v1/jobs/{job}/retry", json={"name": "again", "limits": {"max_runtime_seconds": 60}})
    assert response.status_code == 202, response.text
    retry = response.json()
    assert response.headers["location"] == f"/v1/jobs/{retry['id']}"
    assert (retry["retry_of"], retry["status"], retry["name"]) == (job, "queued", "again")
    assert retry["limits"]["max_runtime_seconds"] == 60
    assert retry["progress"]["step"] == 1
    assert retry["spec"] == client.get(f"/v1/jobs/{job}").json()["spec"]
    assert client.post(f"/v1/jobs/{job}/retry").status_code == 202


def test_a_job_that_has_succeeded_is_retried_from_where_something_is_left_to_train(
    client: TestClient, database: Database, dataset: str
) -> None:
    job = submit(client, dataset)["id"]
    claim = claim_queued_job(database)
    with database.transaction(write=True) as session:
        for stage, step in enumerate((2, 5)):
            add_checkpoint(
                session, claim, kind="stage", step=step, stage=stage, store_key=f"jobs/{job}/attempt-1/{stage}",
                size_bytes=10, manifest_sha256="0" * 64,
            )  # fmt: skip
    write_events(database, claim, envelopes(step_logged(5)), offset=1)
    succeed_job(database, claim)
    for nothing_left in ({}, {"start": "stage", "stage": 1}):
        problem = expect_problem(client.post(f"/v1/jobs/{job}/retry", json=nothing_left), 409, "job_has_succeeded")
        assert problem["allowed"] == ["delete", "retry"]
    for start in ({"start": "stage", "stage": 0}, {"start": "start"}):
        assert client.post(f"/v1/jobs/{job}/retry", json=start).status_code == 202


def test_a_retry_of_a_branch_never_begins_before_the_branch(
    client: TestClient, database: Database, dataset: str
) -> None:
    parent = failed_with_stage(client, database, dataset)
    branch = client.post(f"/v1/jobs/{parent}/branch", json={"stage": 0, "changes": {"method": "js"}}).json()["id"]
    client.post(f"/v1/jobs/{branch}/cancel")
    # Of the retry, too: nothing but the branch itself knows its parent.
    retry = client.post(f"/v1/jobs/{branch}/retry", json={"start": "start"}).json()
    assert retry["progress"]["step"] == 1
    client.post(f"/v1/jobs/{retry['id']}/cancel")
    assert client.delete(f"/v1/jobs/{parent}").status_code == 204
    for job in (branch, retry["id"]):
        for body in ({}, {"start": "start"}):
            problem = expect_problem(client.post(f"/v1/jobs/{job}/retry", json=body), 409, "branch_point_deleted")
            assert "another experiment" in problem["detail"]


def test_a_retry_of_a_branch_goes_on_from_its_own_checkpoint_without_the_parent(
    client: TestClient, database: Database, dataset: str
) -> None:
    parent = failed_with_stage(client, database, dataset)
    branch = client.post(f"/v1/jobs/{parent}/branch", json={"stage": 0, "changes": {"method": "js"}}).json()["id"]
    claim = claim_queued_job(database)
    assert (claim.job_id, claim.needs_training_state) == (branch, True)
    with database.transaction(write=True) as session:
        add_checkpoint(
            session, claim, kind="training", step=3, stage=1, store_key=f"jobs/{branch}/attempt-1/training-3",
            size_bytes=10, manifest_sha256="0" * 64,
        )  # fmt: skip
    settle_attempt(database, claim, AttemptOutcome.failed(BROKEN))
    assert client.delete(f"/v1/jobs/{parent}").status_code == 204
    retry = client.post(f"/v1/jobs/{branch}/retry")
    assert (retry.status_code, retry.json()["progress"]["step"]) == (202, 3)
    expect_problem(client.post(f"/v1/jobs/{branch}/retry", json={"start": "start"}), 409, "branch_point_deleted")


@pytest.mark.parametrize("body", [{}, {"spec": {"resources": {"device": "cuda"}}}], ids=["memory", "device"])
def test_a_job_that_fits_no_worker_is_warned_of_and_says_so_in_the_queue(
    client: TestClient, database: Database, dataset: str, body: dict[str, Any]
) -> None:
    with database.transaction(write=True) as session:
        for name, memory in (("w1", 4096), ("w2", 1024)):
            register_worker(session, name, [Device("cpu", "CPU", memory)])
    request = {"spec": specification(dataset) | body.get("spec", {})}
    planned = client.post("/v1/jobs/validate", json=request).json()
    (warning,) = (each for each in planned["warnings"] if each["code"] == "no_worker_fits")
    assert ("cuda" in warning["message"]) == bool(body)
    job = client.post("/v1/jobs", json=request).json()
    assert job["plan_warnings"] == planned["warnings"]
    assert job["queue"]["reason"] == "no_worker_fits"
    with database.transaction(write=True) as session:
        register_worker(session, "w3", [Device("cpu", "CPU", None), Device("cuda", "NVIDIA L4", 24 << 30)])
    planned = client.post("/v1/jobs/validate", json=request).json()
    assert "no_worker_fits" not in [each["code"] for each in planned["warnings"]]
    assert client.get(f"/v1/jobs/{job['id']}").json()["queue"]["reason"] == "waiting_for_worker"


def test_retries_and_branches_keep_name_labels_and_priority_unless_others_are_given(
    client: TestClient, database: Database, dataset: str
) -> None:
    job = failed_with_stage(client, database, dataset)
    inherited = {"name": "first", "labels": {"team": "nlp"}, "priority": 7}
    for path, body in (("retry", {}), ("branch", {"stage": 0})):
        descendant = client.post(f"/v1/jobs/{job}/{path}", json=body).json()
        assert {field: descendant[field] for field in inherited} == inherited, path
        given: dict[str, Any] = {"name": None, "labels": {}, "priority": 0}
        descendant = client.post(f"/v1/jobs/{job}/{path}", json=body | given).json()
        assert {field: descendant[field] for field in given} == given, path


@pytest.mark.parametrize(
    "body", [{"start": "stage"}, {"stage": 0}, {"start": "middle"}, {"start": "stage", "stage": -1}, {"from": "start"}]
)
def test_an_inconsistent_start_of_a_retry_is_refused(
    client: TestClient, database: Database, dataset: str, body: Any
) -> None:
    job = failed_with_stage(client, database, dataset)
    expect_problem(client.post(f"/v1/jobs/{job}/retry", json=body), 422, "invalid")


def test_a_live_job_is_neither_retried_nor_deleted(client: TestClient, dataset: str) -> None:
    job = submit(client, dataset)["id"]
    for refused in (client.post(f"/v1/jobs/{job}/retry"), client.delete(f"/v1/jobs/{job}")):
        assert expect_problem(refused, 409, "job_is_live")["allowed"] == ["cancel"]


def test_a_branch_applies_its_changes(client: TestClient, database: Database, dataset: str) -> None:
    job = failed_with_stage(client, database, dataset)
    changes = {"method": {"name": "skew_reverse_kl", "alpha": 0.2}, "curriculum": {"temperature": {"end": 3.0}}}
    response = client.post(f"/v1/jobs/{job}/branch", json={"stage": 0, "changes": changes})
    assert response.status_code == 201, response.text
    branch = response.json()
    assert (branch["branch_of"], branch["spec"]["method"]["alpha"]) == (job, 0.2)
    stages = client.get(f"/v1/jobs/{branch['id']}/stages").json()["data"]
    assert [stage["status"] for stage in stages][:2] == ["succeeded", "pending"]
    assert stages[-1]["temperature"] == 3.0
    expect_problem(client.post(f"/v1/jobs/{job}/branch", json={"stage": 1}), 404, "stage_not_saved")


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"seed": 99}, "/changes/seed"),
        ({"curriculum": {"stages": 3}}, "/changes/curriculum/stages"),
        ({"curriculum": {"control": {"kind": "no_curriculum"}}}, "/changes/curriculum/control"),
        ({"student": {"random": {"layers": 1}}}, "/changes/student"),
        ({"training": {"lerning_rate": 1}}, "/changes/training/lerning_rate"),
        ({"curriculum": None}, "/changes/curriculum"),
    ],
)
def test_a_branch_cannot_change_what_its_training_state_depends_on(
    client: TestClient, database: Database, dataset: str, changes: Any, pointer: str
) -> None:
    job = failed_with_stage(client, database, dataset)
    problem = expect_problem(
        client.post(f"/v1/jobs/{job}/branch", json={"stage": 0, "changes": changes}), 422, "spec_invalid"
    )
    assert pointers(problem) == [pointer]


def test_an_update_changes_the_named_fields_alone(client: TestClient, dataset: str) -> None:
    job = submit(client, dataset, name="old", labels={"a": "1"}, priority=1)
    response = client.patch(f"/v1/jobs/{job['id']}", json={"priority": 9})
    assert response.status_code == 200
    changed = response.json()
    assert (changed["priority"], changed["name"], changed["labels"]) == (9, "old", {"a": "1"})
    assert client.patch(f"/v1/jobs/{job['id']}", json={"name": None}).json()["name"] is None
    expect_problem(client.patch(f"/v1/jobs/{job['id']}", json={"priority": 101}), 422, "invalid")
    expect_problem(client.patch(f"/v1/jobs/{job['id']}", json={"status": "paused"}), 422, "invalid")
    client.post(f"/v1/jobs/{job['id']}/cancel")
    problem = expect_problem(client.patch(f"/v1/jobs/{job['id']}", json={"priority": 3}), 422, "invalid")
    assert pointers(problem) == ["/priority"]
    assert client.patch(f"/v1/jobs/{job['id']}", json={"labels": {}}).json()["labels"] == {}


def test_an_ended_job_is_deleted_with_all_that_it_owns(client: TestClient, database: Database, dataset: str) -> None:
    job = failed_with_stage(client, database, dataset)
    child = client.post(f"/v1/jobs/{job}/branch", json={"stage": 0}).json()["id"]
    expect_problem(client.delete(f"/v1/jobs/{job}"), 409, "job_is_needed")
    client.post(f"/v1/jobs/{child}/cancel")
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    expect_problem(client.get(f"/v1/jobs/{job}"), 404, "job_not_found")
    expect_problem(client.delete(f"/v1/jobs/{job}"), 404, "job_not_found")
    assert client.get(f"/v1/jobs/{child}").json()["branch_of"] == job


@pytest.mark.parametrize(
    "limits", [{"max_wait_seconds": 0}, {"max_attempts": 0}, {"max_runtime_seconds": 1.5}, {"x": 1}]
)
def test_invalid_limits_are_refused(client: TestClient, dataset: str, limits: Any) -> None:
    expect_problem(client.post("/v1/jobs", json={"spec": specification(dataset), "limits": limits}), 422, "invalid")


def test_no_job_may_have_more_attempts_than_the_service_allows(client: TestClient, dataset: str) -> None:
    response = client.post("/v1/jobs", json={"spec": specification(dataset), "limits": {"max_attempts": 100}})
    assert pointers(expect_problem(response, 422, "invalid")) == ["/limits/max_attempts"]


def test_workers_are_listed_with_their_jobs_and_drained(client: TestClient, database: Database, dataset: str) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "w1", [Device("cuda", "NVIDIA L4", 24 << 30), Device("cpu", "CPU", None)])
        register_worker(session, "w2", [Device("cpu", "CPU", 8 << 30)])
    job = submit(client, dataset)["id"]
    claim = claim_queued_job(database)
    busy, idle = client.get("/v1/workers").json()["data"]
    assert (busy["id"], busy["state"], busy["job"]) == ("w1", "busy", job)
    assert [device["kind"] for device in busy["devices"]] == ["cuda", "cpu"]
    assert (idle["state"], idle["job"]) == ("idle", None)
    assert client.post("/v1/workers/w1/drain").json()["state"] == "draining"
    settle_attempt(database, claim, AttemptOutcome.released())
    assert client.get("/v1/workers").json()["data"][0]["state"] == "drained"
    assert client.post("/v1/workers/w1/drain", json={"how": None}).json()["state"] == "idle"
    expect_problem(client.post("/v1/workers/nobody/drain"), 404, "worker_not_found")
    page = client.get("/v1/workers", params={"limit": 1, "after": "w1"}).json()
    assert ([worker["id"] for worker in page["data"]], page["has_more"]) == (["w2"], False)


def test_quarantined_worker_says_why_and_checks_itself_once_it_is_undrained(
    client: TestClient, database: Database
) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "w1", [Device("cpu", "CPU", None)])
        quarantine(session, "w1", "The GPU is lost.", wait=lambda _: 600)
    (worker,) = client.get("/v1/workers").json()["data"]
    assert (worker["state"], worker["quarantine"]["reason"]) == ("quarantined", "The GPU is lost.")
    assert worker["quarantine"]["since"] < worker["quarantine"]["checks_at"]
    undrained = client.post("/v1/workers/w1/drain", json={"how": None}).json()
    assert undrained["state"] == "quarantined"
    assert undrained["quarantine"]["checks_at"] < worker["quarantine"]["checks_at"]


def test_job_that_backs_off_says_until_when_and_what_failed(
    client: TestClient, database: Database, dataset: str
) -> None:
    job = submit(client, dataset)
    assert (job["failed_attempts"], job["not_before"]) == ([], None)
    lost = EndReason("engine_failure", "The GPU is lost.", "system", True, "See the log.")
    claim = claim_queued_job(database)
    with database.transaction(write=True) as session:
        settle(session, claim, AttemptOutcome.failed(lost), retry=RetryPolicy(base_seconds=600))
    queued = client.get(f"/v1/jobs/{job['id']}").json()
    assert (queued["status"], queued["queue"]["reason"]) == ("queued", "backing_off")
    assert queued["queue"]["until"] == queued["not_before"] > queued["updated_at"]
    (failed,) = queued["failed_attempts"]
    assert (failed["id"], failed["worker"], failed["end"]) == (1, "w1", "failed")
    assert failed["end_reason"]["message"] == "The GPU is lost."
    assert client.get("/v1/jobs").json()["data"][0]["not_before"] == queued["not_before"]
