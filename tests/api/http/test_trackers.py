"""Trackers of a job over HTTP: what is refused, what each has, and the files that some make."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.jobs.tracker_feed import due_trackers, record_failure, record_file, record_sent
from domain.settings import Settings
from domain.workers.repository import record_scheduler
from tests.support.requests import expect_problem, pointers, specification, submit
from tests.support.worker_actions import claim_queued_job, succeed_job

ALL = ("tensorboard", "mlflow", "wandb", "wandb_offline")


def have(database: Database, *channels: str) -> None:
    with database.transaction(write=True) as session:
        record_scheduler(session, "s1", reaches_broker=True, trackers=channels)


WRONG: tuple[tuple[Any, str], ...] = (
    ({"kind": "mlflow", "experiment": ""}, "/trackers/0/experiment"),
    ({"kind": "mlflow", "tracking_uri": "http://169.254.169.254"}, "/trackers/0/tracking_uri"),
    ({"kind": "mlflow", "tags": {"mlflow.user": "x"}}, "/trackers/0/tags"),
    ({"kind": "wandb", "mode": "disabled"}, "/trackers/0/mode"),
    ({"kind": "wandb", "project": "a/b"}, "/trackers/0/project"),
    ({"kind": "wandb", "api_key": "k"}, "/trackers/0/api_key"),
    ({"kind": "comet"}, "/trackers/0"),
    ({}, "/trackers/0"),
    ("mlflow", "/trackers/0"),
)


def test_wrong_options_are_refused_by_field(client: TestClient, database: Database, dataset: str) -> None:
    have(database, *ALL)
    for tracker, pointer in WRONG:
        body = {"spec": specification(dataset), "trackers": [tracker]}
        for address in ("/v1/jobs", "/v1/jobs/validate"):
            assert pointers(expect_problem(client.post(address, json=body), 422, "invalid")) == [pointer], tracker


@pytest.mark.parametrize("channels", [(), ("tensorboard", "wandb_offline")], ids=["none", "files"])
def test_a_tracker_that_no_scheduler_has_is_refused_with_what_it_needs(
    client: TestClient, database: Database, dataset: str, channels: tuple[str, ...]
) -> None:
    have(database, *channels)
    trackers = [{"kind": "tensorboard"}, {"kind": "mlflow"}, {"kind": "wandb"}]
    body = {"spec": specification(dataset), "trackers": trackers}
    for address in ("/v1/jobs", "/v1/jobs/validate"):
        problem = expect_problem(client.post(address, json=body), 422, "invalid")
        refused = [f"/trackers/{index}/kind" for index in range(1 if channels else 0, 3)]
        assert pointers(problem) == refused
        assert "MLFLOW_TRACKING_URI" in problem["errors"][-2]["detail"]


def test_while_no_scheduler_lives_nothing_is_refused(client: TestClient, dataset: str) -> None:
    assert submit(client, dataset, trackers=[{"kind": "mlflow"}])["trackers"][0]["experiment"] == "pocl"


def test_of_each_kind_one_is_taken(client: TestClient, database: Database, dataset: str) -> None:
    have(database, *ALL)
    trackers = [{"kind": "wandb"}, {"kind": "wandb", "mode": "offline"}]
    body = {"spec": specification(dataset), "trackers": trackers}
    problem = expect_problem(client.post("/v1/jobs", json=body), 422, "invalid")
    assert pointers(problem) == ["/trackers/1/kind"]


def test_the_trackers_of_a_job_say_what_they_have(client: TestClient, database: Database, dataset: str) -> None:
    have(database, *ALL)
    job = submit(client, dataset, trackers=[{"kind": "mlflow", "experiment": "kd"}, {"kind": "tensorboard"}])["id"]
    listed = client.get(f"/v1/jobs/{job}/trackers").json()["data"]
    assert [(each["kind"], each["state"], each["step"], each["run_id"]) for each in listed] == [
        ("mlflow", "open", 0, None),
        ("tensorboard", "open", 0, None),
    ]
    claim_queued_job(database)
    with database.transaction(write=True) as session:
        (due,) = due_trackers(session, "mlflow", limit=9)
        record_sent(session, due, {"loss": 7}, complete=False, next_seconds=0, run_id="r1", run_url="#/runs/r1")
        message = "The MLflow server does not answer."
        record_failure(session, due, "tracker_unreachable", message, wait_seconds=9, give_up_seconds=9)
    shown = client.get(f"/v1/jobs/{job}/trackers").json()["data"][0]
    assert shown == {
        "kind": "mlflow",
        "options": {"kind": "mlflow", "experiment": "kd", "run_name": None, "tags": {}},
        "state": "open",
        "run_id": "r1",
        "run_url": "#/runs/r1",
        "step": 7,
        "failures": 1,
        "problem": {"code": "tracker_unreachable", "message": message},
    }
    (warning,) = client.get(f"/v1/jobs/{job}").json()["warnings"]
    assert warning["message"].startswith("mlflow: The MLflow server does not answer.")


def test_the_file_of_a_tracker_is_downloaded(
    client: TestClient, database: Database, settings: Settings, dataset: str, tmp_path: Path
) -> None:
    have(database, *ALL)
    job = submit(client, dataset, trackers=[{"kind": "tensorboard"}])["id"]
    address = f"/v1/jobs/{job}/trackers/tensorboard/file"
    expect_problem(client.get(address), 404, "tracker_file_not_ready")
    expect_problem(client.get(f"/v1/jobs/{job}/trackers/wandb/file"), 404, "tracker_file_not_ready")
    claim = claim_queued_job(database)
    succeed_job(database, claim)
    file = tmp_path / "events.out.tfevents.1.job"
    file.write_bytes(b"events")
    key = f"jobs/{job}/trackers/tensorboard-1/{file.name}"
    stored = ArtifactStore(settings.artifact_root).publish_file(file, key)
    with database.transaction(write=True) as session:
        (due,) = due_trackers(session, "tensorboard", limit=9)
        record_file(session, due, store_key=key, size_bytes=stored.size, sha256=stored.sha256)
    response = client.get(address)
    assert response.content == b"events"
    assert file.name in response.headers["content-disposition"]
    assert client.head(address).headers["content-length"] == "6"
    assert client.get(f"/v1/jobs/{job}").json()["stored_bytes"] == 6
    assert client.delete(f"/v1/jobs/{job}").status_code == 204


def test_a_retry_keeps_the_trackers_unless_others_are_given(
    client: TestClient, database: Database, dataset: str
) -> None:
    have(database, *ALL)
    job = submit(client, dataset, trackers=[{"kind": "mlflow", "experiment": "kd"}])["id"]
    client.post(f"/v1/jobs/{job}/cancel")
    kept = client.post(f"/v1/jobs/{job}/retry").json()
    assert [each["experiment"] for each in kept["trackers"]] == ["kd"]
    other = client.post(f"/v1/jobs/{job}/retry", json={"trackers": []}).json()
    assert other["trackers"] == []
    assert client.get(f"/v1/jobs/{other['id']}/trackers").json()["data"] == []
