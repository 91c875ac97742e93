"""Submitting, validating, listing, polling and cancelling jobs."""

from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from domain.db import Database
from domain.jobs.leases import Claim
from domain.jobs.repository import get_job
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.settings import Settings
from pocl.events import Event, EventEnvelope, RunStarted, StageStarted, StepLogged, Warned
from tests.support.requests import (
    AUTHORIZED,
    JOB_RESOURCES,
    LOOPBACK,
    expect_problem,
    pointers,
    specification,
    submit,
    write_model,
)
from tests.support.rows import envelopes
from tests.support.worker_actions import claim_queued_job, settle_attempt, write_events

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def report(database: Database, claim: Claim, *events: Event) -> None:
    """Record events of the engine."""
    write_events(database, claim, [EventEnvelope(at=AT, event=event) for event in events], offset=1)


def step(number: int, **fields: Any) -> StepLogged:
    figures: dict[str, Any] = {
        "step": number, "total_steps": 10, "stage": 0, "loss": 2.0 / number, "cross_entropy": 1.0, "divergence": 0.5,
        "learning_rate": 1e-3, "grad_norm": 1.0, "temperature": 1.5, "kd_weight": 0.7, "tokens": 8,
        "tokens_seen": 8 * number, "tokens_per_second": 100.0, "eta_seconds": 60.0,
        "eta_low_seconds": 50.0, "eta_high_seconds": 90.0,
    }  # fmt: skip
    return StepLogged(**figures | fields)


STARTED = (
    RunStarted(resumed_from_step=None, total_steps=10, stages=2),
    StageStarted(stage=0, samples=4, temperature=1.0, kd_weight=0.7, steps=5, first_step=0),
)

# --- Submitting -----------------------------------------------------------------------------------------


def test_a_job_is_queued_with_every_default_named(client: TestClient, dataset: str) -> None:
    body = {"spec": specification(dataset, method="js"), "name": "first", "labels": {"team": "nlp"}, "priority": 7}
    response = client.post("/v1/jobs", json=body)
    job = response.json()
    assert response.status_code == 201
    assert (job["status"], job["name"], job["labels"], job["priority"]) == ("queued", "first", {"team": "nlp"}, 7)
    assert job["spec"]["method"] == {"name": "js", "scale_by_tau_squared": True, "beta": 0.5}
    assert job["spec"]["training"]["learning_rate"] == 3e-4
    assert job["queue"] == {"position": 1, "ahead": 0, "reason": "no_worker", "starts_at": None, "until": None}
    assert job["created_at"].endswith("Z")
    assert client.get(response.headers["location"]).json() == job


def test_a_resolved_specification_resolves_to_itself(client: TestClient, dataset: str) -> None:
    first = submit(client, dataset)["spec"]
    assert client.post("/v1/jobs", json={"spec": first}).json()["spec"] == first


def test_the_dry_run_returns_the_plan_and_stores_nothing(client: TestClient, dataset: str) -> None:
    response = client.post("/v1/jobs/validate", json={"spec": specification(dataset, curriculum={"stages": 2})})
    assert response.status_code == 200
    plan = response.json()
    assert [stage["samples"] for stage in plan["stages"]] == [4, 8]
    assert [stage["temperature"] for stage in plan["stages"]] == [1.0, 2.0]
    assert plan["samples"] == 8
    assert plan["total_steps"] == sum(stage["steps"] for stage in plan["stages"])
    estimate = plan["estimate"]
    assert estimate["memory_bytes"] > 0
    work = [(each["phase"], each["work"]) for each in estimate["passes"]]
    assert work[:3] == [("ranking", "generation"), ("ranking", "scoring"), ("caching_teacher", "hidden_states")]
    assert work[3:] == [("training", "training")] * 2
    assert estimate["flops"] == sum(each["flops"] for each in estimate["passes"]) > estimate["training_flops"] > 0
    assert "no_validation" in {warning["code"] for warning in plan["warnings"]}
    assert client.get("/v1/jobs").json()["data"] == []


WRONG_SPECIFICATIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"traning": {}}, "/spec/traning", "extra_forbidden"),
    ({"training": {"lr": 1}}, "/spec/training/lr", "extra_forbidden"),
    ({"method": "SECRET"}, "/spec/method", "union_tag_invalid"),
    ({"method": {"name": "tvd", "beta": 0.1}}, "/spec/method/beta", "extra_forbidden"),
    ({"seed": "SECRET"}, "/spec/seed", "int_parsing"),
    ({"curriculum": {"stages": 9}}, "/spec/curriculum/stages", "stages_exceed_samples"),
    ({"curriculum": {"temperature": {"start": 3}}}, "/spec/curriculum/temperature", "value_error"),
    ({"data": {"train": {"dataset": "ds_unknown1"}}}, "/spec/data/train/dataset", "dataset_not_found"),
    ({"data": {"train": {"path": "/etc/passwd"}}}, "/spec/data/train/path", "dataset_required"),
    ({"teacher": {"checkpoint": "ckpt_unknown1"}}, "/spec/teacher/checkpoint", "checkpoint_not_found"),
    ({"student": {"from_teacher": {"layers": [0, 9]}}}, "/spec/student/from_teacher/layers/1", "layer_missing"),
    ({"teacher": {}}, "/spec/teacher", "value_error"),
]


@pytest.mark.parametrize("address", ["/v1/jobs", "/v1/jobs/validate"])
def test_a_wrong_specification_is_refused_at_the_field(client: TestClient, dataset: str, address: str) -> None:
    for fields, pointer, code in WRONG_SPECIFICATIONS:
        response = client.post(address, json={"spec": specification(dataset) | fields})
        problem = expect_problem(response, 422, "spec_invalid")
        assert (pointer, code) in [(error["pointer"], error["code"]) for error in problem["errors"]], problem
        assert "SECRET" not in response.text
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_missing_model_is_refused(client: TestClient, dataset: str) -> None:
    response = client.post("/v1/jobs", json={"spec": specification(dataset) | {"teacher": {"path": "gpt9"}}})
    assert pointers(expect_problem(response, 422, "model_not_found")) == ["/spec/teacher/path"]


def test_a_path_outside_the_model_roots_is_refused(client: TestClient, settings: Settings, dataset: str) -> None:
    (root,) = settings.model_roots
    root.mkdir(parents=True)
    (root / "link").symlink_to("/etc")
    for path in ("/etc", "../../..", "/proc/self/cwd", "link", str(root.parent), f"{root}/../.."):
        response = client.post("/v1/jobs", json={"spec": specification(dataset) | {"student": {"path": path}}})
        assert pointers(expect_problem(response, 422, "path_outside_model_roots")) == ["/spec/student/path"]
        assert str(settings.home) not in response.text


def test_models_with_different_vocabularies_are_refused(client: TestClient, settings: Settings, dataset: str) -> None:
    (root,) = settings.model_roots
    write_model(root / "teacher", tokens={"a": 0, "b": 1})
    write_model(root / "student", tokens={"a": 1, "b": 0})
    models = {"teacher": {"path": "teacher"}, "student": {"path": "student"}}
    response = client.post("/v1/jobs", json={"spec": specification(dataset) | models})
    assert pointers(expect_problem(response, 422, "vocabulary_mismatch")) == ["/spec/student"]
    same = {"teacher": {"path": "teacher"}, "student": {"path": "teacher"}}
    assert client.post("/v1/jobs", json={"spec": specification(dataset) | same}).status_code == 201


def test_a_submission_to_a_full_queue_is_refused_as_retryable(app: FastAPI, client: TestClient, dataset: str) -> None:
    app.state.settings = app.state.settings.model_copy(update={"max_jobs_queued": 1})
    submit(client, dataset)
    response = client.post("/v1/jobs", json={"spec": specification(dataset)})
    assert expect_problem(response, 429, "quota_exceeded")["retryable"] is True
    assert response.headers["retry-after"]


def test_an_unprintable_name_is_refused(client: TestClient, dataset: str) -> None:
    for name in ("tab\tbed", "line\nbreak", "\u202eevil"):
        response = client.post("/v1/jobs", json={"spec": specification(dataset), "name": name})
        assert pointers(expect_problem(response, 422, "invalid")) == ["/name"]


# --- Finding --------------------------------------------------------------------------------------------


def test_pages_hold_every_job_once_while_others_arrive(client: TestClient, dataset: str) -> None:
    expected = [submit(client, dataset)["id"] for _ in range(5)]
    listed: list[str] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after": page["last_id"]} if page["last_id"] else {}
        page = client.get("/v1/jobs", params={"limit": 2, **after}).json()
        listed += [job["id"] for job in page["data"]]
        submit(client, dataset)
    assert listed == expected[::-1]


def test_jobs_are_found_by_state_and_by_label(client: TestClient, dataset: str) -> None:
    red, blue = (submit(client, dataset, labels={"colour": colour, "a.b/c": "="})["id"] for colour in ("red", "blue"))
    client.post(f"/v1/jobs/{red}/cancel")

    def list_ids(**parameters: Any) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=parameters).json()["data"]]

    assert list_ids(label="colour=red") == [red]
    assert list_ids(label=["colour=blue", "a.b/c=="]) == [blue]
    assert list_ids(label=["colour=blue", "a.b/c=x"]) == []
    assert list_ids(status="queued") == [blue]
    assert list_ids(status=["queued", "cancelled"]) == [blue, red]
    assert list_ids(status="running") == []


def test_an_invalid_filter_is_refused(client: TestClient) -> None:
    wrong = ({"status": "waiting"}, {"label": "no-equals"}, {"label": "a=\0"}, {"after": "\0"}, {"limit": "x"})
    for parameters in wrong:
        expect_problem(client.get("/v1/jobs", params=parameters), 422, "invalid")


UNKNOWN = ("job_00000000000000000000000000", "ds_00000000", "job_%00", "JOB_1", "job_" + "1" * 99)


def test_an_unknown_job_is_not_found(client: TestClient) -> None:
    for unknown in UNKNOWN:
        for resource in JOB_RESOURCES:
            expect_problem(client.get(f"/v1/jobs/{unknown}{resource}"), 404, "job_not_found")
        expect_problem(client.post(f"/v1/jobs/{unknown}/cancel"), 404, "job_not_found")


# --- Watching -------------------------------------------------------------------------------------------


def test_a_job_shows_its_progress(client: TestClient, database: Database, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    claim = claim_queued_job(database)
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "preparing"
    report(database, claim, *STARTED, step(1), step(2))
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert job["status"] == "running"
    assert job["queue"] is None
    assert (job["progress"]["step"], job["progress"]["total_steps"]) == (2, 10)
    # A fifth of the training, and what came before it.
    assert 20 < job["progress"]["percent"] < 100
    assert (job["progress"]["stage"], job["progress"]["stages"]) == (0, 2)
    assert job["eta"] == {
        "seconds": 60.0,
        "low_seconds": 50.0,
        "high_seconds": 90.0,
        "finish_at": "2026-01-02T03:05:05Z",
    }
    assert (job["latest"]["loss"], job["latest"]["temperature"]) == (1.0, 1.5)


def test_a_conditional_poll_is_not_modified_until_the_job_changes(
    client: TestClient, database: Database, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    first = client.get(f"/v1/jobs/{job_id}")
    etag = first.headers["etag"]
    for header in (etag, f'W/{etag}, "x"', f'"x",{etag}', "*"):
        again = client.get(f"/v1/jobs/{job_id}", headers={"if-none-match": header})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    claim_queued_job(database)
    changed = client.get(f"/v1/jobs/{job_id}", headers={"if-none-match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag


def test_the_etag_changes_with_the_position_in_the_queue(client: TestClient, database: Database, dataset: str) -> None:
    submit(client, dataset)
    waiting = submit(client, dataset)["id"]
    before = client.get(f"/v1/jobs/{waiting}")
    assert before.json()["queue"] == {
        "position": 2,
        "ahead": 1,
        "reason": "no_worker",
        "starts_at": None,
        "until": None,
    }
    claim_queued_job(database)
    after = client.get(f"/v1/jobs/{waiting}", headers={"if-none-match": before.headers["etag"]})
    assert after.json()["queue"] == {"position": 1, "ahead": 0, "reason": "no_worker", "starts_at": None, "until": None}


def test_stages_are_shown_as_planned_and_then_as_reported(client: TestClient, database: Database, dataset: str) -> None:
    spec = specification(dataset, curriculum={"stages": 2})
    job_id = client.post("/v1/jobs", json={"spec": spec}).json()["id"]
    report(database, claim_queued_job(database), *STARTED)
    stages = client.get(f"/v1/jobs/{job_id}/stages").json()["data"]
    assert [(stage["index"], stage["samples"], stage["status"]) for stage in stages] == [
        (0, 4, "running"),
        (1, 8, "pending"),
    ]


def test_events_have_no_gap_and_are_paged_from_any_number(client: TestClient, database: Database, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    report(database, claim_queued_job(database), *STARTED)
    whole = client.get(f"/v1/jobs/{job_id}/events").json()
    numbers = [event["id"] for event in whole["data"]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {"status", "run_started", "stage_started"} <= {event["type"] for event in whole["data"]}
    page = client.get(f"/v1/jobs/{job_id}/events", params={"after": 2, "limit": 1}).json()
    assert (page["data"], page["has_more"], page["last_id"]) == ([whole["data"][2]], True, 3)


def test_metrics_are_thinned_out_and_limited_to_the_requested_steps(
    client: TestClient, database: Database, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    claim = claim_queued_job(database)
    report(database, claim, *STARTED, *(step(number) for number in range(1, 101)))
    parameters: dict[str, Any] = {"names": ["loss", "temperature"], "resolution": 10, "from_step": 11, "to_step": 100}
    series = client.get(f"/v1/jobs/{job_id}/metrics", params=parameters).json()["series"]
    assert [each["name"] for each in series] == ["loss", "temperature"]
    for each in series:
        assert (each["steps"][0], each["steps"][-1]) == (11, 100)
        assert 10 <= len(each["steps"]) <= 11
    assert series[0]["values"] == [2.0 / number for number in series[0]["steps"]]
    assert {each["name"] for each in client.get(f"/v1/jobs/{job_id}/metrics").json()["series"]} >= {"loss", "grad_norm"}


def test_invalid_metric_parameters_are_rejected(client: TestClient, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    wrong: list[dict[str, Any]] = [{"resolution": 1}, {"from_step": -1}, {"names": "a\0"}, {"to_step": 2**40}]
    for parameters in wrong:
        expect_problem(client.get(f"/v1/jobs/{job_id}/metrics", params=parameters), 422, "invalid")


# --- Cancelling -----------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once_and_once(client: TestClient, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    first = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (first.status_code, first.json()["status"]) == (202, "cancelled")
    again = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()) == (200, first.json())
    assert client.get(f"/v1/jobs/{job_id}").json()["end_reason"]["code"] == "cancelled"


def test_a_running_job_is_cancelling_until_its_worker_stops(
    client: TestClient, database: Database, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    claim = claim_queued_job(database)
    responses = [client.post(f"/v1/jobs/{job_id}/cancel") for _ in range(2)]
    assert [(response.status_code, response.json()["status"]) for response in responses] == [
        (202, "cancelling"),
        (200, "cancelling"),
    ]
    settle_attempt(database, claim, AttemptOutcome.cancelled())
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"


def test_a_job_that_ended_otherwise_cannot_be_cancelled(client: TestClient, database: Database, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    settle_attempt(database, claim_queued_job(database), AttemptOutcome.succeeded())
    problem = expect_problem(client.post(f"/v1/jobs/{job_id}/cancel"), 409, "illegal_transition")
    assert problem["allowed"] == ["delete", "retry"]
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"


class Witness:
    """ASGI middleware that reads a job from the database at the moment a response begins."""

    def __init__(self, app: FastAPI, database_url: str, job_id: str) -> None:
        self._app = app
        self._database = Database(database_url)
        self._job_id = job_id
        self.statuses: list[JobStatus] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_look(message: Message) -> None:
            if message["type"] == "http.response.start":
                with self._database.transaction(write=False) as session:
                    self.statuses.append(get_job(session, "default", self._job_id).status)
            await send(message)

        await self._app(scope, receive, send_and_look)

    def close(self) -> None:
        self._database.close()


def test_a_change_is_committed_before_the_response(
    app: FastAPI, client: TestClient, settings: Settings, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    witness = Witness(app, settings.database_url, job_id)
    response = TestClient(witness, base_url=LOOPBACK, headers=AUTHORIZED).post(f"/v1/jobs/{job_id}/cancel")
    witness.close()
    assert response.status_code == 202
    assert witness.statuses == [JobStatus.CANCELLED]


# --- Artifacts, logs and methods -----------------------------------------------------------------------


def test_an_artifact_of_a_job_that_goes_on_is_not_ready(client: TestClient, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    for resource in ("ranking", "report", "result"):
        expect_problem(client.get(f"/v1/jobs/{job_id}/{resource}"), 404, "artifact_not_ready")


def test_an_artifact_of_a_job_that_ended_without_it_was_not_produced(client: TestClient, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    client.post(f"/v1/jobs/{job_id}/cancel")
    for resource in ("ranking", "report", "result"):
        expect_problem(client.get(f"/v1/jobs/{job_id}/{resource}"), 404, "artifact_not_produced")


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    ("resource", "changes", "reason"),
    [
        ("ranking", {"curriculum": {"stages": 1}}, "none are ranked"),
        ("ranking", {"curriculum": {"control": {"kind": "all_samples"}}}, "none are ranked"),
        ("answers", {}, "none are answered"),
    ],
)
def test_an_artifact_that_the_specification_does_not_ask_for_is_not_said_to_come(
    resource: str, changes: dict[str, Any], reason: str, ended: bool, client: TestClient, dataset: str
) -> None:
    job_id = submit(client, dataset, spec=specification(dataset) | changes)["id"]
    if ended:
        client.post(f"/v1/jobs/{job_id}/cancel")
    problem = expect_problem(client.get(f"/v1/jobs/{job_id}/{resource}"), 404, "artifact_not_planned")
    assert reason in problem["detail"]


def test_a_job_that_no_worker_claimed_has_no_attempt_and_an_empty_log(client: TestClient, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    assert client.get(f"/v1/jobs/{job_id}/attempts").json()["data"] == []
    log = client.get(f"/v1/jobs/{job_id}/logs")
    assert (log.status_code, log.text, log.headers["content-type"]) == (200, "", "text/plain; charset=utf-8")
    expect_problem(client.get(f"/v1/jobs/{job_id}/logs", params={"attempt": 1}), 404, "attempt_not_found")


def test_methods_describe_their_parameters(client: TestClient) -> None:
    methods = {each["name"]: each for each in client.get("/v1/methods").json()["data"]}
    assert methods["js"]["parameters"]["properties"]["beta"]["default"] == 0.5
    assert methods["js"]["parameters"]["additionalProperties"] is False
    for name, method in methods.items():
        assert method["description"]
        assert method["parameters"]["properties"]["name"]["const"] == name


def test_every_method_that_is_listed_is_accepted(client: TestClient, dataset: str) -> None:
    for method in client.get("/v1/methods").json()["data"]:
        body = {"spec": specification(dataset, method=method["name"])}
        assert client.post("/v1/jobs/validate", json=body).status_code == 200


def test_a_job_counts_its_warnings_and_says_what_its_history_lacks(
    client: TestClient, database: Database, dataset: str
) -> None:
    job = submit(client, dataset)["id"]
    assert client.get(f"/v1/jobs/{job}").json()["warnings"] == []
    warned = envelopes(*[Warned(code="slow", message="The disk is slow.")] * 3)
    write_events(database, claim_queued_job(database), warned, offset=1)
    shown = client.get(f"/v1/jobs/{job}").json()
    (warning,) = shown["warnings"]
    assert (warning["code"], warning["count"], warning["first_at"] < warning["last_at"]) == ("slow", 3, True)
    assert shown["history"] == {"events_dropped": 0, "metrics_dropped": 0, "metric_window": 1, "deleted_at": None}
    assert "warnings" not in client.get("/v1/jobs").json()["data"][0]
