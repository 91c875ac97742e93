"""The push of a student to the Hub over HTTP: what is refused at submission, what is shown, and another try."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs.models import Job
from domain.jobs.publication_feed import DuePublication, claim_publication, record_failed_push, record_published
from domain.settings import Settings
from domain.workers.repository import record_scheduler
from tests.support.requests import expect_problem, pointers, specification
from tests.support.rows import save_checkpoint
from tests.support.scrapes import scrape, value
from tests.support.worker_actions import claim_queued_job, succeed_job

HUB = {"repo": "acme/student"}
ADDRESSES = ("/v1/jobs", "/v1/jobs/validate")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"hub_publish_to": ("acme", "My-Team")})


def be_alive(database: Database, *, publishes: bool = True) -> None:
    with database.transaction(write=True) as session:
        record_scheduler(session, "s1", reaches_broker=True, publishes=publishes)


def submit_push(client: TestClient, dataset: str, **push: Any) -> dict[str, Any]:
    spec = specification(dataset, export={"hub": {**HUB, **push}})
    response = client.post("/v1/jobs", json={"spec": spec})
    assert response.status_code == 201, response.text
    job: dict[str, Any] = response.json()
    return job


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "/spec/export/hub/repo"),
    ({"repo": "student"}, "/spec/export/hub/repo"),
    ({"repo": "acme/../student"}, "/spec/export/hub/repo"),
    ({"repo": "acme/student.git"}, "/spec/export/hub/repo"),
    ({**HUB, "branch": "refs/pr/1"}, "/spec/export/hub/branch"),
    ({**HUB, "branch": "a" * 40}, "/spec/export/hub/branch"),
    ({**HUB, "checkpoint": "training"}, "/spec/export/hub/checkpoint"),
    ({**HUB, "token": "hf_secret"}, "/spec/export/hub/token"),
    ({**HUB, "checkpoint": "best"}, "/spec"),
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_is_no_push_is_refused_by_field(
    client: TestClient, database: Database, dataset: str, address: str
) -> None:
    be_alive(database)
    for hub, pointer in WRONG:
        body = {"spec": specification(dataset, export={"hub": hub})}
        problem = expect_problem(client.post(address, json=body), 422, "spec_invalid")
        assert pointers(problem) == [pointer], hub
        assert "hf_secret" not in str(problem)


@pytest.mark.parametrize("address", ADDRESSES)
def test_another_owner_is_refused_with_those_that_there_are(
    client: TestClient, database: Database, dataset: str, address: str
) -> None:
    be_alive(database)
    body = {"spec": specification(dataset, export={"hub": {"repo": "other/student"}})}
    problem = expect_problem(client.post(address, json=body), 422, "spec_invalid")
    (error,) = problem["errors"]
    assert (error["pointer"], error["code"]) == ("/spec/export/hub/repo", "hub_owner_not_allowed")
    assert "acme, My-Team" in error["detail"]
    body = {"spec": specification(dataset, export={"hub": {"repo": "MY-TEAM/student"}})}
    assert client.post(address, json=body).status_code < 300


def test_a_service_without_a_token_says_so_and_one_without_schedulers_takes_the_job(
    client: TestClient, database: Database, dataset: str
) -> None:
    submit_push(client, dataset)
    be_alive(database, publishes=False)
    body = {"spec": specification(dataset, export={"hub": HUB})}
    for address in ADDRESSES:
        problem = expect_problem(client.post(address, json=body), 422, "spec_invalid")
        (error,) = problem["errors"]
        assert (error["pointer"], error["code"]) == ("/spec/export/hub", "hub_publishing_not_available")
        assert "POCL_HUB_WRITE_TOKEN" in error["detail"]


def take(database: Database) -> DuePublication:
    with database.transaction(write=True) as session:
        due = claim_publication(session, lease_seconds=60)
    assert due is not None
    return due


@pytest.fixture
def succeeded(client: TestClient, database: Database, dataset: str) -> str:
    """A job that has succeeded, and whose student is to be pushed."""
    be_alive(database)
    job = submit_push(client, dataset, private=False)
    assert job["publication"] is None
    claim = claim_queued_job(database)
    save_checkpoint(database, claim, "final", 20)
    succeed_job(database, claim)
    return str(job["id"])


def test_the_job_shows_what_comes_of_it(client: TestClient, database: Database, succeeded: str) -> None:
    address = f"/v1/jobs/{succeeded}"
    response = client.get(address)
    shown = response.json()["publication"]
    assert shown.pop("checkpoint").startswith("ckpt_")
    assert shown.pop("not_before") is not None
    assert shown == {
        "state": "pending",
        "repo": "acme/student",
        "branch": "main",
        "attempts": 0,
        "error": None,
        "url": None,
        "commit": None,
        "published_at": None,
    }
    due = take(database)
    # What a poll has is not what it was.
    again = client.get(address, headers={"if-none-match": response.headers["etag"]})
    assert again.status_code == 200
    assert (again.json()["publication"]["state"], again.json()["publication"]["not_before"]) == ("uploading", None)
    with database.transaction(write=True) as session:
        record_published(session, due, commit="c" * 40, url="https://hub.example/acme/student")
    shown = client.get(address).json()["publication"]
    assert (shown["state"], shown["commit"], shown["url"]) == (
        "published",
        "c" * 40,
        "https://hub.example/acme/student",
    )
    assert [event["type"] for event in client.get(f"{address}/events").json()["data"]][-1] == "published"


def test_a_failed_one_is_tried_again_once(client: TestClient, database: Database, succeeded: str) -> None:
    address = f"/v1/jobs/{succeeded}/publication/retry"
    response = client.post(address)
    assert (response.status_code, response.json()["publication"]["state"]) == (200, "pending")
    due = take(database)
    with database.transaction(write=True) as session:
        record_failed_push(session, due, "hub_token_refused", "The Hub does not accept it.", wait_seconds=None)
    shown = client.get(f"/v1/jobs/{succeeded}").json()["publication"]
    assert (shown["state"], shown["error"]["code"]) == ("failed", "hub_token_refused")
    key = {"idempotency-key": "once"}
    first, repeated = (client.post(address, headers=key) for _ in range(2))
    assert (first.status_code, repeated.status_code) == (202, 202)
    assert repeated.headers["idempotent-replayed"] == "true"
    assert client.post(address).status_code == 200
    due = take(database)
    with database.transaction(write=True) as session:
        record_published(session, due, commit="c" * 40, url="https://hub.example/acme/student")
    expect_problem(client.post(address), 409, "already_published")


@pytest.mark.usefixtures("succeeded")
def test_metrics_count_what_is_under_way_and_what_has_failed(client: TestClient) -> None:
    families = scrape(client)
    assert value(families, "pocl_publications", state="pending") == 1
    assert value(families, "pocl_publications", state="failed") == 0
    assert value(families, "pocl_publications_oldest_seconds") is not None


def test_a_job_that_pushes_nothing_has_no_publication(client: TestClient, database: Database, dataset: str) -> None:
    be_alive(database)
    job = client.post("/v1/jobs", json={"spec": specification(dataset)}).json()
    assert job["publication"] is None
    expect_problem(client.post(f"/v1/jobs/{job['id']}/publication/retry"), 404, "publication_not_found")
    expect_problem(client.post("/v1/jobs/job_00000000/publication/retry"), 404, "job_not_found")
    # What a worker of the version before would not know is not in its row.
    with database.transaction(write=False) as session:
        assert set(session.get_one(Job, job["id"]).spec["export"]) == {"dtype"}
