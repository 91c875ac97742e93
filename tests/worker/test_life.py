"""The life of a job with a worker at it: paused, resumed, retried, branched, limited."""

from typing import Any

import pytest

from domain.errors import IllegalMove
from domain.jobs import actions, lineage
from domain.jobs.actions import JobIsLive, JobIsNeeded
from domain.jobs.lineage import StageNotSaved, StartAt
from domain.jobs.models import Job
from domain.jobs.repository import list_stages, metric_series
from domain.jobs.states import JobStatus, PauseAt, StageStatus
from domain.jobs.submission import Limits, Wishes
from tests.support.harness import PROJECT, Workshop
from tests.worker.fake_engine import STEPS, STEPS_PER_STAGE
from tests.worker.test_supervisor import meanwhile, reaches


def pause(workshop: Workshop, job: str, at: PauseAt = "now") -> actions.Change:
    with workshop.database.transaction(write=True) as session:
        return actions.pause_job(session, PROJECT, job, at)


def resume(workshop: Workshop, job: str) -> actions.Change:
    with workshop.database.transaction(write=True) as session:
        return actions.resume_job(session, PROJECT, job)


def retry(workshop: Workshop, job: str, start: StartAt | None = None, **wishes: Any) -> Job:
    return lineage.retry_job(
        workshop.database,
        workshop.settings,
        project=PROJECT,
        job_id=job,
        start=start or StartAt(),
        wishes=Wishes(**wishes),
    )


def branch(workshop: Workshop, job: str, stage: int, changes: dict[str, Any]) -> Job:
    return lineage.branch_job(
        workshop.database,
        workshop.settings,
        project=PROJECT,
        job_id=job,
        stage=stage,
        changes=changes,
        wishes=Wishes(name="other"),
    )


@pytest.fixture
def quick(workshop: Workshop) -> Workshop:
    """With heartbeats so close that a wish is heard soon."""
    return Workshop(workshop.home, workshop.database_url, lease_seconds=1.2, databases=workshop.databases)


def test_a_job_that_is_paused_now_goes_on_from_where_it_was(quick: Workshop) -> None:
    job = quick.submit()
    with meanwhile(lambda: (reaches(quick, job, 3), pause(quick, job))):
        assert quick.supervisor("--hold", "3").work_one() is JobStatus.PAUSED
    assert quick.supervisor().work_one() is None
    assert quick.job(job).attempts_spent == 0
    assert not pause(quick, job).made
    assert resume(quick, job).made
    assert not resume(quick, job).made
    assert quick.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in quick.attempts(job)] == [None, 3]
    assert quick.moves(job) == [
        *("queued", "preparing", "running", "pausing", "paused"),
        *("queued", "preparing", "running", "succeeded"),
    ]


def test_a_job_that_is_paused_at_the_end_of_its_stage_ends_it_first(quick: Workshop) -> None:
    job = quick.submit()
    with meanwhile(lambda: (reaches(quick, job, 3), pause(quick, job, "stage_end"))):
        status = quick.supervisor("--hold-until-pause", "3").work_one()
    assert status is JobStatus.PAUSED
    assert quick.job(job).step == STEPS_PER_STAGE
    assert quick.job(job).pause_at is None
    resume(quick, job)
    assert quick.supervisor().work_one() is JobStatus.SUCCEEDED


def test_a_pause_at_the_end_of_a_stage_may_still_become_one_now(quick: Workshop) -> None:
    job = quick.submit()

    def ask() -> None:
        reaches(quick, job, 3)
        assert pause(quick, job, "stage_end").made
        assert not pause(quick, job, "stage_end").made
        assert pause(quick, job, "now").made
        assert not pause(quick, job, "stage_end").made

    with meanwhile(ask):
        assert quick.supervisor("--hold", "3").work_one() is JobStatus.PAUSED
    assert quick.job(job).step == 3


def test_only_a_job_that_a_worker_holds_can_be_paused(workshop: Workshop) -> None:
    job = workshop.submit()
    with pytest.raises(IllegalMove):
        pause(workshop, job)
    workshop.supervisor().work_one()
    for act in (pause, resume):
        with pytest.raises(IllegalMove):
            act(workshop, job)


def test_a_job_that_ran_for_as_long_as_it_may_is_saved_and_fails(quick: Workshop) -> None:
    job = quick.submit(wishes=Wishes(limits=Limits(max_runtime_seconds=1)))
    assert quick.supervisor("--hold", "3").work_one() is JobStatus.FAILED
    row = quick.job(job)
    assert (row.end_reason or {})["code"] == "max_runtime_exceeded"
    assert row.runtime_left_seconds == 0
    # Its state is there: a retry with another limit goes on.
    again = retry(quick, job, limits=Limits(max_runtime_seconds=600))
    assert quick.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in quick.attempts(again.id)] == [3]


def test_what_an_attempt_ran_is_taken_off_the_runtime(workshop: Workshop) -> None:
    job = workshop.submit(wishes=Wishes(limits=Limits(max_runtime_seconds=600)))
    workshop.supervisor("--die", "3").work_one()
    left = workshop.job(job).runtime_left_seconds
    assert left is not None
    assert 0 < left < 600
    assert workshop.job(job).runs_until is None


def test_a_failed_job_is_retried_from_its_newest_state(workshop: Workshop) -> None:
    job = workshop.submit()
    assert workshop.supervisor("--fail", "5").work_one() is JobStatus.FAILED
    again = retry(workshop, job, name="again", priority=3)
    row = workshop.job(again.id)
    assert (row.retry_of, row.name, row.priority, row.step) == (job, "again", 3, 4)
    assert row.resolved == workshop.job(job).resolved
    assert workshop.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in workshop.attempts(again.id)] == [4]
    # The job that failed is as it was.
    assert workshop.job(job).status is JobStatus.FAILED
    assert len(workshop.attempts(job)) == 1


def test_an_ended_job_is_retried_from_a_stage_or_from_the_start(workshop: Workshop) -> None:
    job = workshop.submit()
    workshop.supervisor().work_one()
    from_stage = retry(workshop, job, StartAt("stage", 0))
    from_start = retry(workshop, job, StartAt("start"))
    assert [workshop.supervisor().work_one() for _ in range(2)] == [JobStatus.SUCCEEDED] * 2
    assert [a.resumed_from_step for a in workshop.attempts(from_stage.id)] == [STEPS_PER_STAGE]
    assert [a.resumed_from_step for a in workshop.attempts(from_start.id)] == [None]
    with pytest.raises(StageNotSaved):
        retry(workshop, job, StartAt("stage", 7))
    # The ranking came along: the engine made none.
    shas = {workshop.artefacts(each)["ranking"].sha256 for each in (job, from_stage.id, from_start.id)}
    assert len(shas) == 1


def test_a_retry_that_failed_before_it_saved_anything_is_retried_from_what_it_had(workshop: Workshop) -> None:
    job = workshop.submit()
    workshop.supervisor("--fail", "5").work_one()
    second = retry(workshop, job)
    assert workshop.supervisor("--fail", "5").work_one() is JobStatus.FAILED
    third = retry(workshop, second.id)
    assert workshop.job(third.id).starts_from == workshop.job(second.id).starts_from


def test_a_live_job_is_not_retried(workshop: Workshop) -> None:
    with pytest.raises(JobIsLive):
        retry(workshop, workshop.submit())


def test_a_branch_goes_on_from_a_stage_with_another_method_and_other_temperatures(workshop: Workshop) -> None:
    job = workshop.submit()
    workshop.supervisor().work_one()
    changes = {"method": "js", "curriculum": {"temperature": {"start": 1.0, "end": 4.0}}}
    made = branch(workshop, job, 0, changes)
    row = workshop.job(made.id)
    assert (row.branch_of, row.name, row.step) == (job, "other", STEPS_PER_STAGE)
    assert row.percent == min(100, 100 * STEPS_PER_STAGE / row.total_steps)
    assert row.resolved["method"]["name"] == "js"
    with workshop.database.transaction(write=False) as session:
        stages = list_stages(session, made.id)
    assert [stage.status for stage in stages] == [StageStatus.SUCCEEDED, StageStatus.PENDING]
    assert stages[1].temperature == 4.0
    assert workshop.supervisor().work_one() is JobStatus.SUCCEEDED
    assert [attempt.resumed_from_step for attempt in workshop.attempts(made.id)] == [STEPS_PER_STAGE]
    assert metrics(workshop, made.id) == list(range(1, STEPS + 1))


def test_a_branch_begins_with_the_metrics_up_to_its_stage(workshop: Workshop) -> None:
    job = workshop.submit()
    workshop.supervisor().work_one()
    made = branch(workshop, job, 0, {})
    assert metrics(workshop, made.id) == list(range(1, STEPS_PER_STAGE + 1))


def test_a_job_that_another_begins_with_is_not_deleted(workshop: Workshop) -> None:
    job = workshop.submit()
    with pytest.raises(JobIsLive):
        delete(workshop, job)
    workshop.supervisor().work_one()
    made = branch(workshop, job, 0, {})
    with pytest.raises(JobIsNeeded):
        delete(workshop, job)
    assert workshop.supervisor().work_one() is JobStatus.SUCCEEDED
    assert delete(workshop, job) == [f"jobs/{job}"]
    assert workshop.job(made.id).branch_of == job


def delete(workshop: Workshop, job: str) -> list[str]:
    with workshop.database.transaction(write=True) as session:
        return actions.delete_job(session, PROJECT, job)


def metrics(workshop: Workshop, job: str) -> list[int]:
    """The steps whose loss is known."""
    with workshop.database.transaction(write=False) as session:
        (series,) = metric_series(session, job, points=100, names=["loss"])
    return list(series.steps)


def test_a_job_waits_as_long_as_it_may_by_the_databases_clock(workshop: Workshop) -> None:
    row = workshop.job(workshop.submit(wishes=Wishes(limits=Limits(max_wait_seconds=60))))
    assert row.waits_until is not None
    assert 59 < (row.waits_until - row.created_at).total_seconds() < 61
