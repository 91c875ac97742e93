"""Group commit: each submission is in the database once it is answered, and none suffers by another's fault."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from domain.db import Database
from domain.errors import QuotaExceeded, Unprocessable
from domain.jobs.group_commit import Created, GroupCommit
from domain.jobs.job_options import JobOptions
from domain.jobs.models import Job, JobEvent, JobStage
from domain.jobs.planning import JobPlan, plan_job
from domain.jobs.queue import QueuedJob, queue_position
from domain.jobs.submission import Submission, create_jobs
from domain.settings import Settings
from tests.support.rows import SPEC, insert_dataset

THREADS = 12


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=database_url, max_jobs_queued=THREADS)


@pytest.fixture
def plan(database: Database, settings: Settings) -> JobPlan:
    with database.transaction(write=True) as session:
        dataset = insert_dataset(session).id
    with database.transaction(write=False) as session:
        return plan_job(session, settings, {**SPEC, "data": {"train": {"dataset": dataset}}}, project="default")


def submit_all(
    database: Database, settings: Settings, submissions: Sequence[Submission], *, project: str = "default"
) -> list[QueuedJob | Exception]:
    """Submit at once, while a first transaction holds the lock of writers."""
    group, arrived = GroupCommit(database), threading.Barrier(len(submissions) + 1)

    def submit(submission: Submission) -> QueuedJob | Exception:
        arrived.wait()
        try:
            queued = group.submit(settings, project, submission)
        except Exception as error:  # noqa: BLE001 # the outcome is what is looked at
            return error
        with database.transaction(write=False) as session:
            assert session.get(Job, queued.job.id) is not None
        return queued

    with ThreadPoolExecutor(len(submissions)) as pool:
        done = [pool.submit(submit, each) for each in submissions]
        with database.transaction(write=True) as session:
            session.execute(sa.text("UPDATE projects SET description = description"))
            arrived.wait()
        return [each.result() for each in done]


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def test_each_is_stored_whole_when_it_is_answered(database: Database, settings: Settings, plan: JobPlan) -> None:
    submissions = [Submission(plan, JobOptions(name=f"n{n}"), request_id=f"r{n}") for n in range(THREADS)]
    queued = submit_all(database, settings, submissions)
    jobs = [each.job for each in queued if isinstance(each, QueuedJob)]
    assert [(job.name, job.request_id) for job in jobs] == [(f"n{n}", f"r{n}") for n in range(THREADS)]
    with database.transaction(write=False) as session:
        for job in jobs:
            events = session.scalars(sa.select(JobEvent).where(JobEvent.job_id == job.id)).all()
            assert [(each.seq, each.type, each.in_outbox) for each in events] == [(1, "status", True)]
            stages = session.scalars(sa.select(JobStage).where(JobStage.job_id == job.id).order_by(JobStage.index))
            assert [stage.steps for stage in stages] == [stage.steps for stage in plan.stages]
            assert session.get_one(Job, job.id).created_at == job.created_at


def test_submissions_that_wait_are_written_together(database: Database, settings: Settings, plan: JobPlan) -> None:
    batches: list[int] = []

    def create(*given: Any, project: str) -> list[Created]:
        batches.append(len(given[-1]))
        return create_jobs(*given, project=project)

    group = GroupCommit(database, create=create)
    with ThreadPoolExecutor(THREADS) as pool:
        with database.transaction(write=True) as session:
            session.execute(sa.text("UPDATE projects SET description = description"))
            first = pool.submit(group.submit, settings, "default", Submission(plan))
            wait_for(lambda: group.waiting("default") == 0 and group.is_writing("default"))
            others = [pool.submit(group.submit, settings, "default", Submission(plan)) for _ in range(THREADS - 1)]
            wait_for(lambda: group.waiting("default") == THREADS - 1)
        positions = [each.result().position.position for each in (first, *others)]
    assert batches == [1, THREADS - 1]
    assert sorted(positions) == list(range(1, THREADS + 1))


def test_no_more_are_admitted_than_the_quota_allows(database: Database, settings: Settings, plan: JobPlan) -> None:
    limited = settings.model_copy(update={"max_jobs_queued": 5})
    outcomes = submit_all(database, limited, [Submission(plan)] * THREADS)
    assert sum(isinstance(each, QuotaExceeded) for each in outcomes) == THREADS - 5
    with database.transaction(write=False) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Job)) == 5


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda plan: Submission(plan, JobOptions(priority=1000)), Unprocessable),
        # What is no number is found while the others are written.
        (lambda plan: Submission(replace(plan, stages=(replace(plan.stages[0], steps="many"),))), TypeError),
    ],
    ids=["refused", "not-written"],
)
def test_one_that_fails_fails_alone(
    database: Database,
    settings: Settings,
    plan: JobPlan,
    spoil: Callable[[JobPlan], Submission],
    error: type[Exception],
) -> None:
    outcomes = submit_all(database, settings, [spoil(plan), *[Submission(plan)] * 3])
    assert isinstance(outcomes[0], error)
    assert all(isinstance(each, QueuedJob) for each in outcomes[1:])


def test_the_position_is_that_of_the_queue(database: Database, settings: Settings, plan: JobPlan) -> None:
    group = GroupCommit(database)
    for priority in (0, 5, 0, 9, 5):
        queued = group.submit(settings, "default", Submission(plan, JobOptions(priority=priority)))
        with database.transaction(write=False) as session:
            assert queue_position(session, queued.job, worker_seconds=60) == queued.position
