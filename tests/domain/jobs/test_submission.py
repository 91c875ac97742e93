"""Checking, creating and cancelling jobs."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from domain.checkpoints.repository import delete_checkpoint, get_checkpoint
from domain.db import Database
from domain.errors import (
    ApiError,
    EngineRefusal,
    IllegalTransition,
    JobNotFound,
    PathOutsideModelRoots,
    QuotaExceeded,
    Unprocessable,
)
from domain.jobs.actions import cancel_job
from domain.jobs.event_recorder import add_checkpoint
from domain.jobs.leases import Claim, claim_next, settle
from domain.jobs.models import Job, JobEvent, JobStage
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.jobs.submission import (
    JobOptions,
    JobPlan,
    create_job,
    plan_job,
    submit_job,
)
from domain.settings import Settings
from pocl.spec import DistillationSpec, resolve
from tests.support.requests import write_model
from tests.support.rows import SPEC, add_job, claim_job, dump_tables, insert_dataset, reload_job, set_status

Planner = Callable[[dict[str, Any]], JobPlan]
Spec = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=database_url, max_jobs_queued=3)


@pytest.fixture
def dataset(database: Database) -> str:
    """The id of a data set of 100 rows."""
    with database.transaction(write=True) as session:
        return insert_dataset(session).id


@pytest.fixture
def spec(dataset: str) -> Spec:
    """A specification that is valid but for what the test changes."""
    return lambda **fields: {**SPEC, "data": {"train": {"dataset": dataset}}, **fields}


@pytest.fixture
def plan(database: Database, settings: Settings) -> Planner:
    def plan(raw: dict[str, Any]) -> JobPlan:
        with database.transaction(write=False) as session:
            return plan_job(session, settings, raw, project="default")

    return plan


def pointers(refused: pytest.ExceptionInfo[ApiError]) -> dict[str, str]:
    return {error.pointer: error.code for error in refused.value.field_errors}


@contextmanager
def refusal(code: str) -> Iterator[pytest.ExceptionInfo[EngineRefusal]]:
    """Expect a refusal of the engine under this code."""
    with pytest.raises(EngineRefusal) as refused:
        yield refused
    assert refused.value.code == code


# --- The dry run ----------------------------------------------------------------------------------------


def test_a_plan_shows_the_stages_over_the_rows_of_the_data_set(plan: Planner, spec: Spec) -> None:
    found = plan(spec(curriculum={"stages": 4}))
    assert [stage.samples for stage in found.stages] == [25, 50, 75, 100]
    assert found.total_steps == sum(stage.steps for stage in found.stages)
    assert found.spec == resolve(spec(curriculum={"stages": 4}))
    assert found.estimate is not None


def test_a_plan_writes_nothing(database: Database, plan: Planner, spec: Spec) -> None:
    before = dump_tables(database)
    plan(spec())
    assert dump_tables(database) == before


def test_all_wrong_fields_are_named_at_once(plan: Planner, spec: Spec) -> None:
    with refusal("spec_invalid") as refused:
        plan(spec(seed=-1, sead=1, training={"batch_size": 0}))
    assert set(pointers(refused)) == {"/seed", "/sead", "/training/batch_size"}


def test_more_stages_than_samples_are_refused(plan: Planner, spec: Spec, database: Database) -> None:
    with database.transaction(write=True) as session:
        small = insert_dataset(session, rows=3).id
    with refusal("spec_invalid") as refused:
        plan(spec(data={"train": {"dataset": small}}, curriculum={"stages": 4}))
    assert pointers(refused) == {"/curriculum/stages": "stages_exceed_samples"}


def test_data_come_from_uploads_and_never_from_a_path(plan: Planner, spec: Spec) -> None:
    with refusal("spec_invalid") as refused:
        plan(spec(data={"train": {"path": "/etc/passwd"}, "validation": {"path": "x.jsonl"}}))
    assert pointers(refused) == {"/data/train/path": "dataset_required", "/data/validation/path": "dataset_required"}


def test_everything_that_the_project_lacks_is_named_at_once(plan: Planner, spec: Spec, database: Database) -> None:
    with database.transaction(write=True) as session:
        theirs = insert_dataset(session, project="theirs").id
    with refusal("spec_invalid") as refused:
        plan(spec(data={"train": {"dataset": theirs}}, student={"checkpoint": "ckpt_00000000"}))
    assert pointers(refused) == {
        "/data/train/dataset": "dataset_not_found",
        "/student/checkpoint": "checkpoint_not_found",
    }


def test_a_model_outside_the_roots_is_refused(plan: Planner, spec: Spec, tmp_path: Path) -> None:
    outside = write_model(tmp_path / "outside", tokens={"a": 0})
    with pytest.raises(PathOutsideModelRoots) as refused:
        plan(spec(teacher={"path": str(outside)}))
    assert pointers(refused) == {"/teacher/path": "path_outside_model_roots"}


def test_a_model_that_is_not_there_is_refused(plan: Planner, spec: Spec, settings: Settings) -> None:
    settings.model_roots[0].mkdir(parents=True)
    with refusal("model_not_found") as refused:
        plan(spec(student={"path": "absent"}))
    assert pointers(refused) == {"/student/path": "model_not_found"}
    assert str(settings.home) not in refused.value.detail


def test_a_directory_that_is_no_model_is_refused(plan: Planner, spec: Spec, settings: Settings) -> None:
    (settings.model_roots[0] / "empty").mkdir(parents=True)
    with refusal("model_unsupported") as refused:
        plan(spec(student={"path": "empty"}))
    assert pointers(refused) == {"/student/path": "model_unsupported"}
    assert str(settings.home) not in refused.value.detail


def test_vocabularies_that_differ_are_refused_at_submission(plan: Planner, spec: Spec, settings: Settings) -> None:
    write_model(settings.model_roots[0] / "teacher", tokens={"a": 0, "b": 1})
    write_model(settings.model_roots[0] / "student", tokens={"a": 1, "b": 0})
    with refusal("vocabulary_mismatch") as refused:
        plan(spec(teacher={"path": "teacher"}, student={"path": "student"}))
    assert pointers(refused) == {"/student": "vocabulary_mismatch"}
    assert plan(spec(teacher={"path": "teacher"}, student={"path": "teacher"})).estimate is not None


def test_a_student_cannot_keep_layers_that_the_teacher_lacks(plan: Planner, spec: Spec) -> None:
    assert plan(spec(student={"from_teacher": {"layers": [0, 3]}})).warnings
    with refusal("spec_invalid") as refused:
        plan(spec(student={"from_teacher": {"layers": [0, 4]}}))
    assert pointers(refused) == {"/student/from_teacher/layers/1": "layer_missing"}


def test_what_cannot_be_inspected_is_said(plan: Planner, spec: Spec) -> None:
    found = plan(spec(teacher={"hub": {"repo": "openai/gpt2"}}))
    assert found.estimate is None
    assert {warning.code for warning in found.warnings} == {"models_not_inspected", "no_validation"}


def test_rows_longer_than_a_models_positions_are_refused(plan: Planner, spec: Spec) -> None:
    with refusal("spec_invalid") as refused:
        plan(spec(student={"random": {"max_positions": 64}}))
    assert pointers(refused) == {"/data/max_length": "exceeds_model_positions"}


def test_fine_tuning_needs_no_teacher(plan: Planner, spec: Spec) -> None:
    raw = spec(method="sft")
    del raw["teacher"]
    assert plan(raw).estimate is not None


def test_a_checkpoint_of_the_project_is_a_model(
    plan: Planner, spec: Spec, database: Database, settings: Settings
) -> None:
    checkpoint = publish(database, claim_job(database), "jobs/a/final")
    assert "models_not_inspected" in {
        warning.code for warning in plan(spec(teacher={"checkpoint": checkpoint})).warnings
    }
    write_model(settings.artifact_root / "jobs/a/final", tokens={"wrong": 0})
    with refusal("vocabulary_mismatch"):
        plan(spec(teacher={"checkpoint": checkpoint}))


def publish(database: Database, claim: Claim, store_key: str) -> str:
    with database.transaction(write=True) as session:
        return add_checkpoint(
            session,
            claim,
            kind="final",
            step=1,
            stage=None,
            store_key=store_key,
            size_bytes=1,
            manifest_sha256="0" * 64,
        ).id


# --- Creation -------------------------------------------------------------------------------------------


def test_a_job_is_queued_with_its_stages_and_its_first_event(
    database: Database, settings: Settings, spec: Spec
) -> None:
    raw = spec(resources={"device": "cpu"})
    options = JobOptions(name="tiny", labels={"team": "nlp"}, priority=7)
    job = submit_job(database, settings, raw, project="default", options=options)
    with database.transaction(write=False) as session:
        stored = session.get_one(Job, job.id)
        stages = session.scalars(sa.select(JobStage).order_by(JobStage.index)).all()
        events = session.scalars(sa.select(JobEvent)).all()
    assert (stored.status, stored.version, stored.event_seq) == (JobStatus.QUEUED, 1, 1)
    assert (stored.posted_spec, stored.device, stored.priority) == (raw, "cpu", 7)
    assert DistillationSpec.model_validate(stored.spec) == resolve(raw)
    assert [stage.samples for stage in stages] == [50, 100]
    assert [(event.seq, event.data["to"]) for event in events] == [(1, "queued")]


def test_what_was_created_can_be_claimed_with_the_same_specification(
    database: Database, settings: Settings, spec: Spec
) -> None:
    submit_job(database, settings, spec(), project="default")
    with database.transaction(write=True) as session:
        claim = claim_next(session, worker="worker-1", lease_seconds=60)
    assert claim is not None
    assert claim.spec == resolve(spec())


def test_a_refused_specification_leaves_no_row(database: Database, settings: Settings, spec: Spec) -> None:
    before = dump_tables(database)
    with refusal("spec_invalid"):
        submit_job(database, settings, spec(seed="x"), project="default")
    assert dump_tables(database) == before


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"name": "x" * 201}, "/name"),
        ({"name": "nul\0"}, "/name"),
        ({"labels": {'a"b': "x"}}, "/labels"),
        ({"labels": {"a": "x\n"}}, "/labels"),
        ({"labels": {str(number): "x" for number in range(17)}}, "/labels"),
        ({"priority": 101}, "/priority"),
        ({"priority": -1}, "/priority"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    database: Database, settings: Settings, spec: Spec, fields: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(Unprocessable) as refused:
        submit_job(database, settings, spec(), project="default", options=JobOptions(**fields))
    assert set(pointers(refused)) == {pointer}


def test_a_projects_queue_is_bounded_even_for_requests_that_come_together(
    database: Database, settings: Settings, spec: Spec
) -> None:
    def submit(_: int) -> bool:
        try:
            submit_job(database, settings, spec(), project="default")
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(submit, range(6))) == settings.max_jobs_queued


def test_the_bound_counts_queued_jobs_of_the_project_only(database: Database, settings: Settings, spec: Spec) -> None:
    with database.transaction(write=True) as session:
        for _ in range(5):
            add_job(session, project="theirs")
            set_status(session, add_job(session).id, JobStatus.RUNNING)
    assert submit_job(database, settings, spec(), project="default").status is JobStatus.QUEUED


def test_a_checkpoint_that_went_since_the_plan_is_noticed(
    database: Database, settings: Settings, plan: Planner, spec: Spec
) -> None:
    checkpoint = publish(database, claim_job(database), "jobs/a/final")
    planned = plan(spec(teacher={"checkpoint": checkpoint}))
    with database.transaction(write=True) as session:
        delete_checkpoint(session, get_checkpoint(session, "default", checkpoint))
    with refusal("spec_invalid"), database.transaction(write=True) as session:
        create_job(session, settings, planned, project="default", options=JobOptions())


# --- Cancelling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.PAUSED])
def test_a_job_that_waits_is_cancelled_at_once(database: Database, status: JobStatus) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        set_status(session, job.id, status)
        cancelled = cancel_job(session, "default", job.id)
    assert (cancelled.changed, cancelled.job.status) == (True, JobStatus.CANCELLED)
    assert cancelled.job.cancel_requested_at is not None


@pytest.mark.parametrize("status", [JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.RECOVERING])
def test_a_job_that_a_worker_has_is_asked_to_end(database: Database, status: JobStatus) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        set_status(session, claim.job_id, status)
        assert cancel_job(session, "default", claim.job_id).job.status is JobStatus.CANCELLING


def test_cancelling_again_changes_nothing(database: Database) -> None:
    claim = claim_job(database)
    for outcome in (None, AttemptOutcome.cancelled()):
        with database.transaction(write=True) as session:
            if outcome is not None:
                settle(session, claim, outcome)
            cancel_job(session, "default", claim.job_id)
        before = dump_tables(database)
        with database.transaction(write=True) as session:
            assert not cancel_job(session, "default", claim.job_id).changed
        assert dump_tables(database) == before


def test_a_job_that_has_ended_cannot_be_cancelled(database: Database) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        settle(session, claim, AttemptOutcome.succeeded())
    with pytest.raises(IllegalTransition) as refused, database.transaction(write=True) as session:
        cancel_job(session, "default", claim.job_id)
    assert refused.value.allowed == ()
    assert reload_job(database, claim).status is JobStatus.SUCCEEDED


def test_a_job_of_another_project_cannot_be_cancelled(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, project="theirs")
        with pytest.raises(JobNotFound):
            cancel_job(session, "default", job.id)
