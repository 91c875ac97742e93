"""Submission and cancellation of jobs."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from huggingface_hub import constants

from domain.checkpoints.repository import get_checkpoint
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
from domain.jobs.checkpoint_deletion import delete_checkpoint
from domain.jobs.event_recorder import add_checkpoint
from domain.jobs.job_options import JobOptions
from domain.jobs.leases import Claim, claim_next, settle
from domain.jobs.models import Job, JobEvent, JobStage
from domain.jobs.planning import JobPlan, plan_job
from domain.jobs.references import ASSUMED_SAMPLES
from domain.jobs.repository import list_other_jobs_needing
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.jobs.submission import create_job, submit_job
from domain.settings import Settings
from pocl.spec import DistillationSpec, resolve
from pocl.spec.hub_allowlist import REPOSITORY_NOT_ALLOWED
from tests.support.requests import write_model
from tests.support.rows import SPEC, add_job, claim_job, dump_tables, insert_dataset, reload_job, set_status

Planner = Callable[[dict[str, Any]], JobPlan]
Spec = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=database_url, max_jobs_queued=3)


@pytest.fixture
def dataset(database: Database) -> str:
    """The id of a data set of 100 samples."""
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


def pointers(raised: pytest.ExceptionInfo[ApiError]) -> dict[str, str]:
    return {error.pointer: error.code for error in raised.value.field_errors}


@contextmanager
def refusal(code: str) -> Iterator[pytest.ExceptionInfo[EngineRefusal]]:
    """Expect a refusal of the engine under this code."""
    with pytest.raises(EngineRefusal) as raised:
        yield raised
    assert raised.value.code == code


# --- The dry run ----------------------------------------------------------------------------------------


def without_day(spec: DistillationSpec) -> DistillationSpec:
    """The specification with the day of its submission, which is always filled in, left open again."""
    assert spec.data.date is not None
    return spec.with_fields({"data": {"date": None}})


def test_a_plan_has_the_stages_over_the_samples_of_the_data_set(plan: Planner, spec: Spec) -> None:
    job_plan = plan(spec(curriculum={"stages": 4}))
    assert [stage.samples for stage in job_plan.stages] == [25, 50, 75, 100]
    assert job_plan.total_steps == sum(stage.steps for stage in job_plan.stages)
    assert without_day(job_plan.spec) == resolve(spec(curriculum={"stages": 4}))
    assert job_plan.estimate is not None


def test_a_plan_writes_nothing(database: Database, plan: Planner, spec: Spec) -> None:
    before = dump_tables(database)
    plan(spec())
    assert dump_tables(database) == before


def test_all_wrong_fields_are_named_at_once(plan: Planner, spec: Spec) -> None:
    with refusal("spec_invalid") as raised:
        plan(spec(seed=-1, sead=1, training={"batch_size": 0}))
    assert set(pointers(raised)) == {"/seed", "/sead", "/training/batch_size"}


def test_more_stages_than_samples_are_refused(plan: Planner, spec: Spec, database: Database) -> None:
    with database.transaction(write=True) as session:
        small = insert_dataset(session, rows=3).id
    with refusal("spec_invalid") as raised:
        plan(spec(data={"train": {"dataset": small}}, curriculum={"stages": 4}))
    assert pointers(raised) == {"/curriculum/stages": "stages_exceed_samples"}


def test_data_come_from_uploads_and_never_from_a_path(plan: Planner, spec: Spec) -> None:
    with refusal("spec_invalid") as raised:
        plan(spec(data={"train": {"path": "/etc/passwd"}, "validation": {"path": "x.jsonl"}}))
    assert pointers(raised) == {"/data/train/path": "dataset_required", "/data/validation/path": "dataset_required"}


def test_all_missing_data_sets_and_checkpoints_are_named_at_once(plan: Planner, spec: Spec, database: Database) -> None:
    with database.transaction(write=True) as session:
        theirs = insert_dataset(session, project="theirs").id
    with refusal("spec_invalid") as raised:
        plan(spec(data={"train": {"dataset": theirs}}, student={"checkpoint": "ckpt_00000000"}))
    assert pointers(raised) == {
        "/data/train/dataset": "dataset_not_found",
        "/student/checkpoint": "checkpoint_not_found",
    }


def test_a_model_outside_the_roots_is_refused(plan: Planner, spec: Spec, tmp_path: Path) -> None:
    outside = write_model(tmp_path / "outside", tokens={"a": 0})
    with pytest.raises(PathOutsideModelRoots) as raised:
        plan(spec(teacher={"path": str(outside)}))
    assert pointers(raised) == {"/teacher/path": "path_outside_model_roots"}


def test_a_missing_model_is_refused(plan: Planner, spec: Spec, settings: Settings) -> None:
    settings.model_roots[0].mkdir(parents=True)
    with refusal("model_not_found") as raised:
        plan(spec(student={"path": "absent"}))
    assert pointers(raised) == {"/student/path": "model_not_found"}
    assert str(settings.home) not in raised.value.detail


def test_a_directory_without_a_model_is_refused(plan: Planner, spec: Spec, settings: Settings) -> None:
    (settings.model_roots[0] / "empty").mkdir(parents=True)
    with refusal("model_unsupported") as raised:
        plan(spec(student={"path": "empty"}))
    assert pointers(raised) == {"/student/path": "model_unsupported"}
    assert str(settings.home) not in raised.value.detail


def test_different_vocabularies_are_refused_at_submission(plan: Planner, spec: Spec, settings: Settings) -> None:
    write_model(settings.model_roots[0] / "teacher", tokens={"a": 0, "b": 1})
    write_model(settings.model_roots[0] / "student", tokens={"a": 1, "b": 0})
    with refusal("vocabulary_mismatch") as raised:
        plan(spec(teacher={"path": "teacher"}, student={"path": "student"}))
    assert pointers(raised) == {"/student": "vocabulary_mismatch"}
    assert plan(spec(teacher={"path": "teacher"}, student={"path": "teacher"})).estimate is not None


def test_a_student_cannot_keep_layers_that_the_teacher_lacks(plan: Planner, spec: Spec) -> None:
    assert plan(spec(student={"from_teacher": {"layers": [0, 3]}})).warnings
    with refusal("spec_invalid") as raised:
        plan(spec(student={"from_teacher": {"layers": [0, 4]}}))
    assert pointers(raised) == {"/student/from_teacher/layers/1": "layer_missing"}


def test_a_plan_warns_of_models_that_were_not_inspected(plan: Planner, spec: Spec) -> None:
    job_plan = plan(spec(teacher={"hub": {"repo": "openai/gpt2"}}))
    assert job_plan.estimate is None
    # The first stage has 50 samples in batches of 8.
    expected = {"models_not_inspected", "no_validation", "small_last_batch"}
    assert {warning.code for warning in job_plan.warnings} == expected


def test_a_repository_that_is_not_allowed_is_refused_at_its_pointer(
    database: Database, settings: Settings, spec: Spec
) -> None:
    only_acme = settings.model_copy(update={"hub_repositories": ("acme/*",)})
    rows = {"train": {"hub": {"repo": "other/rows"}}}
    other = spec(teacher={"hub": {"repo": "other/model"}}, student={"hub": {"repo": "acme/small"}}, data=rows)
    with pytest.raises(EngineRefusal) as raised:
        submit_job(database, only_acme, other, project="default")
    refused = {error.pointer: error.code for error in raised.value.field_errors}
    assert refused == dict.fromkeys(("/teacher/hub/repo", "/data/train/hub/repo"), REPOSITORY_NOT_ALLOWED)
    assert all("acme/*" in error.detail for error in raised.value.field_errors)
    with database.transaction(write=False) as session:
        assert session.scalars(sa.select(Job.id)).all() == []
    allowed = spec(teacher={"hub": {"repo": "acme/model"}}, student={"hub": {"repo": "acme/small"}})
    assert submit_job(database, only_acme, allowed, project="default").status is JobStatus.QUEUED


def test_a_model_of_the_hub_that_is_whole_in_its_cache_is_inspected(
    plan: Planner, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = write_model(tmp_path / "hub" / "models--owner--name" / "snapshots" / commit, tokens={"a": 0, "b": 1})
    hub = {"hub": {"repo": "owner/name", "revision": commit}}
    job_plan = plan(spec(teacher=hub, student={"from_teacher": {"layers": [0]}}))
    assert job_plan.estimate is not None
    assert "models_not_inspected" not in {warning.code for warning in job_plan.warnings}
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    with refusal("model_unsupported") as raised:
        plan(spec(teacher=hub, student={"from_teacher": {"layers": [0]}}))
    assert pointers(raised) == {"/teacher/hub": "model_unsupported"}


def test_samples_of_the_hub_are_assumed_and_the_plan_says_so(plan: Planner, spec: Spec) -> None:
    job_plan = plan(spec(data={"train": {"hub": {"repo": "someone/rows"}}}))
    assert job_plan.samples == ASSUMED_SAMPLES
    assert "samples_assumed" in {warning.code for warning in job_plan.warnings}


def test_samples_longer_than_a_models_positions_are_refused(plan: Planner, spec: Spec) -> None:
    with refusal("spec_invalid") as raised:
        plan(spec(student={"random": {"max_positions": 64}}))
    assert pointers(raised) == {"/data/max_length": "exceeds_model_positions"}


def test_fine_tuning_needs_no_teacher(plan: Planner, spec: Spec) -> None:
    raw = spec(method="sft")
    del raw["teacher"]
    assert plan(raw).estimate is not None


def test_a_checkpoint_of_the_project_can_be_the_teacher(
    plan: Planner, spec: Spec, database: Database, settings: Settings
) -> None:
    checkpoint = publish(database, claim_job(database), "jobs/a/final")
    assert "models_not_inspected" in {
        warning.code for warning in plan(spec(teacher={"checkpoint": checkpoint})).warnings
    }
    write_model(settings.artifact_root / "jobs/a/final", tokens={"wrong": 0})
    with refusal("vocabulary_mismatch"):
        plan(spec(teacher={"checkpoint": checkpoint}))


def test_the_model_that_ranks_is_checked_as_the_others_are(plan: Planner, spec: Spec, settings: Settings) -> None:
    write_model(settings.model_roots[0] / "student", tokens={"a": 0, "b": 1})
    write_model(settings.model_roots[0] / "ranker", tokens={"a": 1, "b": 0})
    models = {"teacher": {"path": "student"}, "student": {"path": "student"}}

    def curriculum(**model: str) -> dict[str, Any]:
        return {"stages": 2, "ranking": {"ranker": {"kind": "model", "model": model}}}

    pointer = "/curriculum/ranking/ranker/model"
    for wrong, code, part in (
        ({"path": "ranker"}, "vocabulary_mismatch", ""),
        ({"path": "absent"}, "model_not_found", "/path"),
        ({"checkpoint": "ckpt_00000000"}, "checkpoint_not_found", "/checkpoint"),
    ):
        with pytest.raises(EngineRefusal) as raised:
            plan(spec(**models, curriculum=curriculum(**wrong)))
        assert pointers(raised) == {pointer + part: code}
    assert plan(spec(**models, curriculum=curriculum(path="student"))).estimate is not None
    # A model that ranks nothing is not looked at.
    assert plan(spec(**models, curriculum={**curriculum(path="absent"), "stages": 1})).estimate is not None


def test_samples_without_a_difficulty_cannot_be_ranked_by_it(plan: Planner, spec: Spec, database: Database) -> None:
    with database.transaction(write=True) as session:
        dataset = insert_dataset(session)
        dataset.ingestion = {"with_difficulty": 97}
        dataset_id = dataset.id
    raw = spec(
        data={"train": {"dataset": dataset_id}}, curriculum={"stages": 2, "ranking": {"ranker": {"kind": "column"}}}
    )
    with refusal("spec_invalid") as raised:
        plan(raw)
    assert pointers(raised) == {"/curriculum/ranking/ranker": "difficulty_missing"}
    assert plan(raw | {"curriculum": {**raw["curriculum"], "stages": 1}}).samples == 100


def test_a_checkpoint_that_is_to_rank_for_a_live_job_is_in_use(
    database: Database, settings: Settings, spec: Spec
) -> None:
    checkpoint = publish(database, claim_job(database), "jobs/a/final")
    ranking = {"ranker": {"kind": "model", "model": {"checkpoint": checkpoint}}}
    submit_job(database, settings, spec(curriculum={"stages": 2, "ranking": ranking}), project="default")
    with database.transaction(write=False) as session:
        assert len(list_other_jobs_needing(session, get_checkpoint(session, "default", checkpoint))) == 1


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


# --- The budget of a control ----------------------------------------------------------------------------


def add_compared_job(database: Database, spec: dict[str, Any], **columns: Any) -> str:
    """A job of two stages that spent 7 and 13 steps."""
    with database.transaction(write=True) as session:
        columns = {"status": JobStatus.SUCCEEDED, **columns}
        job = add_job(session, posted_spec=spec, **columns)
        session.execute(sa.update(JobStage).where(JobStage.job_id == job.id).values(steps=7 + 6 * JobStage.index))
        return job.id


def control_of(job_id: str, **fields: Any) -> dict[str, Any]:
    return {"stages": 2, "control": {"kind": "reversed_order", "budget_of": job_id, **fields}}


def test_a_control_has_the_steps_that_its_job_has_spent(database: Database, plan: Planner, spec: Spec) -> None:
    job_id = add_compared_job(database, spec())
    yesterday = date(2026, 1, 30)
    with database.transaction(write=True) as session:
        job = session.get_one(Job, job_id)
        job.spec = DistillationSpec.model_validate(job.spec).with_day(yesterday).model_dump(mode="json")
    planned = plan(spec(curriculum=control_of(job_id)))
    # Templates that print the day print that of the job, whenever the control is submitted.
    assert planned.spec.data.date == yesterday
    assert [stage.steps for stage in planned.stages] == [7, 13]
    assert planned.spec.curriculum.control is not None
    assert planned.spec.curriculum.control.stage_steps == (7, 13)
    # What was resolved once, such as the specification of a retry, needs the job no more.
    resolved = planned.spec.model_dump(mode="json")
    with database.transaction(write=True) as session:
        session.execute(sa.delete(Job).where(Job.id == job_id))
    assert plan(resolved).spec == planned.spec


@pytest.mark.parametrize(
    ("code", "job_spec", "columns", "fields"),
    [
        ("job_not_found", {}, {"project": "theirs"}, {}),
        ("budget_not_spent", {}, {"status": JobStatus.FAILED}, {}),
        ("budget_of_other_specification", {"training": {"batch_size": 4}}, {}, {}),
        ("budget_of_control", {"curriculum": {"stages": 2, "control": {"kind": "shuffled_stages"}}}, {}, {}),
        ("budget_differs", {}, {}, {"stage_steps": [7, 12]}),
    ],
)
def test_the_budget_of_an_unsuitable_job_is_refused(
    database: Database, plan: Planner, spec: Spec, code: str, job_spec: Any, columns: Any, fields: Any
) -> None:
    job_id = add_compared_job(database, spec(**job_spec), **columns)
    with refusal("spec_invalid") as raised:
        plan(spec(curriculum=control_of(job_id, **fields)))
    assert pointers(raised) == {"/curriculum/control/budget_of": code}


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
    assert without_day(DistillationSpec.model_validate(stored.spec)) == resolve(raw)
    assert [stage.samples for stage in stages] == [50, 100]
    assert [(event.seq, event.data["to"]) for event in events] == [(1, "queued")]


def test_a_claim_has_the_resolved_specification_of_the_submission(
    database: Database, settings: Settings, spec: Spec
) -> None:
    submit_job(database, settings, spec(), project="default")
    with database.transaction(write=True) as session:
        claim = claim_next(session, worker="worker-1", lease_seconds=60)
    assert claim is not None
    assert without_day(claim.spec) == resolve(spec())


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
def test_invalid_options_are_refused(
    database: Database, settings: Settings, spec: Spec, fields: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(Unprocessable) as raised:
        submit_job(database, settings, spec(), project="default", options=JobOptions(**fields))
    assert set(pointers(raised)) == {pointer}


def test_a_projects_queue_is_bounded_for_concurrent_requests(
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


def test_a_checkpoint_deleted_since_the_plan_is_refused(
    database: Database, settings: Settings, plan: Planner, spec: Spec
) -> None:
    checkpoint = publish(database, claim_job(database), "jobs/a/final")
    planned = plan(spec(teacher={"checkpoint": checkpoint}))
    with database.transaction(write=True) as session:
        delete_checkpoint(session, "default", checkpoint)
    with refusal("spec_invalid") as raised, database.transaction(write=True) as session:
        create_job(session, settings, planned, project="default", options=JobOptions())
    assert pointers(raised) == {"/teacher/checkpoint": "checkpoint_expired"}


# --- Cancelling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.PAUSED])
def test_a_waiting_job_is_cancelled_at_once(database: Database, status: JobStatus) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        set_status(session, job.id, status)
        cancelled = cancel_job(session, "default", job.id)
    assert (cancelled.changed, cancelled.job.status) == (True, JobStatus.CANCELLED)
    assert cancelled.job.cancel_requested_at is not None


@pytest.mark.parametrize("status", [JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.RECOVERING])
def test_a_held_job_becomes_cancelling(database: Database, status: JobStatus) -> None:
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
    with pytest.raises(IllegalTransition) as raised, database.transaction(write=True) as session:
        cancel_job(session, "default", claim.job_id)
    assert raised.value.allowed == ("delete", "retry")
    assert reload_job(database, claim).status is JobStatus.SUCCEEDED


def test_a_job_of_another_project_cannot_be_cancelled(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, project="theirs")
        with pytest.raises(JobNotFound):
            cancel_job(session, "default", job.id)
