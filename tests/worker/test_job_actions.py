"""The actions on a job while a worker runs it: pause, resume, retry, branch; and its limits."""

import time
from dataclasses import replace
from typing import Any

import pytest

from domain.errors import IllegalTransition
from domain.jobs import actions, lineage
from domain.jobs.actions import JobIsLive, JobIsNeeded
from domain.jobs.job_options import JobOptions, Limits
from domain.jobs.lineage import RetryStart, StageNotSaved
from domain.jobs.models import Job
from domain.jobs.repository import list_stages, metric_series
from domain.jobs.states import JobStatus, PauseAt, StageStatus
from domain.jobs.work_progress import WorkPlan
from tests.support.harness import PROJECT, ServiceHarness
from tests.worker.fake_engine import STEPS, STEPS_PER_STAGE
from tests.worker.test_supervisor import concurrently, wait_for_step

pytestmark = pytest.mark.system


def pause(harness: ServiceHarness, job: str, at: PauseAt = "now") -> actions.ActionResult:
    with harness.database.transaction(write=True) as session:
        return actions.pause_job(session, PROJECT, job, at)


def resume(harness: ServiceHarness, job: str) -> actions.ActionResult:
    with harness.database.transaction(write=True) as session:
        return actions.resume_job(session, PROJECT, job)


def retry(harness: ServiceHarness, job: str, start: RetryStart | None = None, **options: Any) -> Job:
    with harness.database.transaction(write=False) as session:
        plan = lineage.plan_retry(session, harness.settings, project=PROJECT, job_id=job, start=start or RetryStart())
    with harness.database.transaction(write=True) as session:
        return lineage.create_descendant(session, harness.settings, plan, options)


def branch(harness: ServiceHarness, job: str, stage: int, changes: dict[str, Any]) -> Job:
    with harness.database.transaction(write=False) as session:
        plan = lineage.plan_branch(session, harness.settings, project=PROJECT, job_id=job, stage=stage, changes=changes)
    with harness.database.transaction(write=True) as session:
        return lineage.create_descendant(session, harness.settings, plan, {"name": "other"})


@pytest.fixture
def quick(harness: ServiceHarness) -> ServiceHarness:
    """With heartbeats so frequent that a stop request arrives soon."""
    return ServiceHarness(harness.home, harness.database_url, heartbeat_seconds=0.2, databases=harness.databases)


def test_job_paused_now_resumes_from_where_it_was(quick: ServiceHarness) -> None:
    job = quick.submit()
    with concurrently(lambda: wait_for_step(quick, job, 3), lambda: pause(quick, job)):
        assert quick.supervisor("--hold", "3").work_one() is JobStatus.PAUSED
    assert quick.supervisor().work_one() is None
    assert quick.job(job).attempts_spent == 0
    assert not pause(quick, job).changed
    assert resume(quick, job).changed
    assert not resume(quick, job).changed
    assert quick.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in quick.attempts(job)] == [None, 3]
    assert quick.status_history(job) == [
        *("queued", "preparing", "running", "pausing", "paused"),
        *("queued", "preparing", "running", "succeeded"),
    ]


def test_job_paused_at_stage_end_finishes_its_stage_first(quick: ServiceHarness) -> None:
    job = quick.submit()
    with concurrently(lambda: wait_for_step(quick, job, 3), lambda: pause(quick, job, "stage_end")):
        status = quick.supervisor("--hold-until-pause", "3").work_one()
    assert status is JobStatus.PAUSED
    assert quick.job(job).step == STEPS_PER_STAGE
    assert quick.job(job).pause_at is None
    resume(quick, job)
    assert quick.supervisor().work_one() is JobStatus.SUCCEEDED


def test_pause_at_stage_end_may_become_a_pause_now(quick: ServiceHarness) -> None:
    job = quick.submit()

    def ask() -> None:
        wait_for_step(quick, job, 3)
        assert pause(quick, job, "stage_end").changed
        assert not pause(quick, job, "stage_end").changed
        assert pause(quick, job, "now").changed
        assert not pause(quick, job, "stage_end").changed

    with concurrently(ask):
        assert quick.supervisor("--hold", "3").work_one() is JobStatus.PAUSED
    assert quick.job(job).step == 3


def test_only_a_claimed_job_can_be_paused(harness: ServiceHarness) -> None:
    job = harness.submit()
    with pytest.raises(IllegalTransition):
        pause(harness, job)
    harness.supervisor().work_one()
    for act in (pause, resume):
        with pytest.raises(IllegalTransition):
            act(harness, job)


def test_job_that_exceeds_its_runtime_is_saved_and_fails(quick: ServiceHarness) -> None:
    job = quick.submit(options=JobOptions(limits=Limits(max_runtime_seconds=600)))

    def clock() -> float:
        # Ten minutes are over once the engine has come to its third step.
        return time.monotonic() + (600 if quick.job(job).step >= 3 else 0)

    assert replace(quick.supervisor("--hold", "3"), clock=clock).work_one() is JobStatus.FAILED
    row = quick.job(job)
    assert (row.end_reason or {})["code"] == "max_runtime_exceeded"
    assert row.runtime_left_seconds == 0
    # Its state is there: a retry with another limit goes on.
    again = retry(quick, job, limits=Limits(max_runtime_seconds=6000))
    assert quick.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in quick.attempts(again.id)] == [3]


def test_runtime_of_an_attempt_is_subtracted_from_the_limit(harness: ServiceHarness) -> None:
    job = harness.submit(options=JobOptions(limits=Limits(max_runtime_seconds=600)))
    harness.supervisor("--die", "3").work_one()
    left = harness.job(job).runtime_left_seconds
    assert left is not None
    assert 0 < left < 600
    assert harness.job(job).runs_until is None


def test_failed_job_is_retried_from_its_newest_checkpoint(harness: ServiceHarness) -> None:
    job = harness.submit()
    assert harness.supervisor("--fail", "5").work_one() is JobStatus.FAILED
    again = retry(harness, job, name="again", priority=3)
    row = harness.job(again.id)
    assert (row.retry_of, row.name, row.priority, row.step) == (job, "again", 3, 4)
    assert row.spec == harness.job(job).spec
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in harness.attempts(again.id)] == [4]
    # The job that failed is as it was.
    assert harness.job(job).status is JobStatus.FAILED
    assert len(harness.attempts(job)) == 1


def test_ended_job_is_retried_from_a_stage_or_from_the_start(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor().work_one()
    from_stage = retry(harness, job, RetryStart("stage", 0))
    from_start = retry(harness, job, RetryStart("start"))
    assert [harness.supervisor().work_one() for _ in range(2)] == [JobStatus.SUCCEEDED] * 2
    assert [a.resumed_from_step for a in harness.attempts(from_stage.id)] == [STEPS_PER_STAGE]
    assert [a.resumed_from_step for a in harness.attempts(from_start.id)] == [None]
    with pytest.raises(StageNotSaved):
        retry(harness, job, RetryStart("stage", 7))
    # The ranking was copied, so the engine made none.
    shas = {harness.artifacts(each)["ranking"].sha256 for each in (job, from_stage.id, from_start.id)}
    assert len(shas) == 1


def test_retry_that_failed_before_a_checkpoint_is_retried_from_the_same_checkpoint(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor("--fail", "5").work_one()
    second = retry(harness, job)
    assert harness.supervisor("--fail", "5").work_one() is JobStatus.FAILED
    third = retry(harness, second.id)
    assert harness.job(third.id).starts_from == harness.job(second.id).starts_from


def test_live_job_is_not_retried(harness: ServiceHarness) -> None:
    with pytest.raises(JobIsLive):
        retry(harness, harness.submit())


def test_branch_continues_from_a_stage_with_another_method_and_temperatures(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor().work_one()
    changes = {"method": "js", "curriculum": {"temperature": {"start": 1.0, "end": 4.0}}}
    child = branch(harness, job, 0, changes)
    row = harness.job(child.id)
    assert (row.branch_of, row.name, row.step) == (job, "other", STEPS_PER_STAGE)
    assert row.percent == WorkPlan.from_stored(row.forecast).at_step(STEPS_PER_STAGE, row.total_steps) > 0
    assert row.spec["method"]["name"] == "js"
    with harness.database.transaction(write=False) as session:
        stages = list_stages(session, child.id)
    assert [stage.status for stage in stages] == [StageStatus.SUCCEEDED, StageStatus.PENDING]
    assert stages[1].temperature == 4.0
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in harness.attempts(child.id)] == [STEPS_PER_STAGE]
    assert metrics(harness, child.id) == list(range(1, STEPS + 1))


def test_branch_has_the_metrics_up_to_its_stage(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor().work_one()
    child = branch(harness, job, 0, {})
    assert metrics(harness, child.id) == list(range(1, STEPS_PER_STAGE + 1))


def test_branch_whose_start_is_lost_fails_and_trains_nothing(harness: ServiceHarness) -> None:
    job = harness.submit()
    harness.supervisor().work_one()
    child = branch(harness, job, 0, {"method": "js"})
    (start,) = [each for each in harness.checkpoints(job) if each.id == child.starts_from]
    harness.store.remove(start.store_key)
    assert harness.supervisor().work_one() is JobStatus.QUEUED
    (attempt,) = harness.attempts(child.id)
    assert attempt.end_reason is not None
    assert (attempt.resumed_from_step, attempt.end_reason["code"]) == (None, "storage_failed")
    assert "at which the job begins" in attempt.end_reason["message"]


def test_job_that_a_branch_starts_from_is_not_deleted(harness: ServiceHarness) -> None:
    job = harness.submit()
    with pytest.raises(JobIsLive):
        delete(harness, job)
    harness.supervisor().work_one()
    child = branch(harness, job, 0, {})
    with pytest.raises(JobIsNeeded):
        delete(harness, job)
    assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    assert delete(harness, job) == [f"jobs/{job}"]
    assert harness.job(child.id).branch_of == job


def delete(harness: ServiceHarness, job: str) -> list[str]:
    with harness.database.transaction(write=True) as session:
        return actions.delete_job(session, PROJECT, job)


def metrics(harness: ServiceHarness, job: str) -> list[int]:
    """The steps with a recorded loss."""
    with harness.database.transaction(write=False) as session:
        (series,) = metric_series(session, job, points=100, names=["loss"])
    return list(series.steps)


def test_wait_limit_counts_by_the_clock_of_the_database(harness: ServiceHarness) -> None:
    row = harness.job(harness.submit(options=JobOptions(limits=Limits(max_wait_seconds=60))))
    assert row.waits_until is not None
    assert 59 < (row.waits_until - row.created_at).total_seconds() < 61
