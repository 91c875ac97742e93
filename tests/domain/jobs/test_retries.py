"""Retries: what a failed attempt costs its job, how long the next one waits, and which worker gets it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from domain.db import Database, db_now
from domain.jobs.event_recorder import add_checkpoint
from domain.jobs.leases import Claim, claim_next, settle
from domain.jobs.models import Job, JobAttempt, JobEvent
from domain.jobs.queue import queue_position
from domain.jobs.retries import NO_WAIT, RetryPolicy, count_claimable
from domain.jobs.states import AttemptOutcome, EndReason, JobStatus
from domain.workers.models import Device
from domain.workers.repository import (
    count_due_checks,
    drain,
    end_quarantine,
    quarantine,
    record_failure,
    record_success,
    register_worker,
    worker_health,
)
from tests.support.rows import add_job

CPU = Device("cpu", "CPU", 8 << 30)
GPU_LOST = EndReason("engine_failure", "The GPU is lost.", "system", True, "See the log.")
LOST_GPU = AttemptOutcome.failed(GPU_LOST)
LONGEST = RetryPolicy(base_seconds=10, max_seconds=600, random=lambda: 1.0)


def claim(session: Session, worker: str, retry: RetryPolicy = NO_WAIT) -> Claim | None:
    return claim_next(session, worker=worker, lease_seconds=60, memory={"cpu": 8 << 30}, retry=retry)


def fail(session: Session, worker: str, outcome: AttemptOutcome = LOST_GPU, retry: RetryPolicy = NO_WAIT) -> JobStatus:
    """Claim the next job on a worker and end the attempt; the state of the job afterwards."""
    claimed = claim(session, worker)
    assert claimed is not None
    return settle(session, claimed, outcome, retry=retry)


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 100), st.floats(0, 10**4))
def test_back_off_doubles_from_its_base_to_its_bound_and_is_never_less_than_half(
    failures: int, jitter: float, base: float, longest: float
) -> None:
    delay = RetryPolicy(base, longest, random=lambda: jitter).delay(failures)
    expected = min(longest, base * 2.0 ** min(failures - 1, 200))
    assert expected / 2 * (1 - 1e-9) <= delay <= expected * (1 + 1e-9) or failures > 31


def test_a_failure_that_may_pass_queues_the_job_with_a_time_and_the_reason(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        assert fail(session, "w1", retry=LONGEST) is JobStatus.QUEUED
        row = session.get_one(Job, job.id)
        now = session.scalars(sa.select(db_now())).one()
        assert row.not_before is not None
        assert timedelta(seconds=9) < row.not_before - now <= timedelta(seconds=10)
        statuses = session.scalars(sa.select(JobEvent).where(JobEvent.type == "status").order_by(JobEvent.seq)).all()
        recovering, queued = statuses[-2:]
        assert (recovering.data["to"], recovering.data["reason"]["code"]) == ("recovering", "engine_failure")
        assert (queued.data["to"], queued.data["not_before"]) == ("queued", row.not_before.isoformat())
        # No worker gets it yet, and its position says why.
        assert claim(session, "w2", LONGEST) is None
        register_worker(session, "w2", [CPU])
        position = queue_position(session, row, worker_seconds=60)
        assert position is not None
        assert (position.reason, position.until) == ("backing_off", row.not_before)
        assert count_claimable(session, LONGEST, limit=10) == 0
        session.execute(sa.update(Job).values(not_before=db_now(-1)))
        assert count_claimable(session, LONGEST, limit=10) == 1
        claimed = claim(session, "w2", LONGEST)
        assert claimed is not None
        assert session.get_one(Job, job.id, populate_existing=True).not_before is None


def test_a_job_that_backs_off_is_behind_all_that_may_be_claimed(database: Database) -> None:
    with database.transaction(write=True) as session:
        first = add_job(session, priority=9)
        fail(session, "w1", retry=LONGEST)
        second = add_job(session)
        rows = [session.get_one(Job, job.id, populate_existing=True) for job in (first, second)]
        positions = [queue_position(session, row, worker_seconds=60) for row in rows]
        assert [position.position for position in positions if position is not None] == [2, 1]


def test_a_wait_that_was_set_before_the_clock_was_put_back_is_over(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session)
        fail(session, "w1", retry=LONGEST)
        session.execute(sa.update(Job).values(not_before=db_now(3600)))
        assert claim(session, "w2", LONGEST) is not None


def test_one_worker_spends_one_attempt_however_often_it_fails_the_job(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, max_attempts=2)
        for _ in range(4):
            assert fail(session, "w1") is JobStatus.QUEUED
            assert session.get_one(Job, job.id, populate_existing=True).attempts_spent == 1
        assert fail(session, "w2") is JobStatus.FAILED
        row = session.get_one(Job, job.id, populate_existing=True)
        assert row.reason == GPU_LOST
        history = session.scalars(sa.select(JobAttempt).order_by(JobAttempt.number)).all()
        assert [(each.worker, (each.end_reason or {})["code"]) for each in history] == [
            *[("w1", "engine_failure")] * 4,
            ("w2", "engine_failure"),
        ]


def test_failures_on_one_worker_are_bounded_nevertheless(database: Database) -> None:
    policy = replace(NO_WAIT, max_failures=3)
    with database.transaction(write=True) as session:
        add_job(session)
        assert [fail(session, "w1", retry=policy) for _ in range(4)] == [JobStatus.QUEUED] * 3 + [JobStatus.FAILED]


@pytest.mark.parametrize("outcome", [LOST_GPU, AttemptOutcome.crashed(GPU_LOST)], ids=["failed", "crashed"])
def test_a_sick_worker_costs_the_job_nothing(database: Database, outcome: AttemptOutcome) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, max_attempts=1)
        for worker in ("w1", "w2", "w3"):
            assert fail(session, worker, replace(outcome, worker_is_sick=True)) is JobStatus.QUEUED
        assert session.get_one(Job, job.id, populate_existing=True).attempts_spent == 0


def store_training_state(session: Session, claimed: Claim, step: int) -> None:
    add_checkpoint(
        session,
        claimed,
        kind="training",
        step=step,
        stage=0,
        store_key=f"jobs/{claimed.job_id}/attempt-{claimed.token}/{step}",
        size_bytes=1,
        manifest_sha256="0" * 64,
    )


def test_progress_gives_every_attempt_back(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, max_attempts=2)
        for step in range(10, 60, 10):
            claimed = claim(session, "w1")
            assert claimed is not None
            store_training_state(session, claimed, step)
            assert settle(session, claimed, AttemptOutcome.crashed(GPU_LOST)) is JobStatus.QUEUED
        # The same step again is no progress.
        claimed = claim(session, "w1")
        assert claimed is not None
        store_training_state(session, claimed, 50)
        assert settle(session, claimed, AttemptOutcome.crashed(GPU_LOST)) is JobStatus.FAILED
        assert session.get_one(Job, job.id, populate_existing=True).attempts_spent == 2


def test_a_job_is_left_to_a_worker_that_has_not_failed_it(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session)
        for name in ("w1", "w2"):
            register_worker(session, name, [CPU])
        fail(session, "w1")
        assert claim(session, "w1") is None
        fail(session, "w2")
        # Both have failed it now.
        assert claim(session, "w1") is not None


@pytest.mark.parametrize("other", ["none", "too small", "drained", "quarantined"])
def test_a_job_returns_to_a_worker_that_failed_it_where_no_other_fits(database: Database, other: str) -> None:
    with database.transaction(write=True) as session:
        add_job(session, memory_bytes=4 << 30)
        register_worker(session, "w1", [CPU])
        if other != "none":
            register_worker(session, "w2", [Device("cpu", "CPU", 1 << 30)] if other == "too small" else [CPU])
        if other == "drained":
            drain(session, "w2", "finish")
        if other == "quarantined":
            quarantine(session, "w2", "The GPU is lost.", wait=lambda _: 60)
        fail(session, "w1")
        assert claim(session, "w1") is not None


def test_a_job_returns_to_a_worker_that_failed_it_long_ago_while_others_are_busy(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session)
        for name in ("w1", "w2"):
            register_worker(session, name, [CPU])
        fail(session, "w1")
        session.execute(sa.update(JobAttempt).values(ended_at=db_now(-601)))
        assert claim(session, "w1") is not None


def test_six_jobs_survive_a_worker_whose_gpu_is_lost(database: Database) -> None:
    with database.transaction(write=True) as session:
        jobs = [add_job(session, max_attempts=1 if number == 0 else 3).id for number in range(6)]
        for name in ("sick", "well"):
            register_worker(session, name, [CPU])
        for _ in jobs:
            claimed = claim(session, "sick")
            if claimed is not None:
                settle(session, claimed, replace(LOST_GPU, worker_is_sick=True), retry=NO_WAIT)
        while (claimed := claim(session, "well")) is not None:
            settle(session, claimed, AttemptOutcome.succeeded())
        assert {job.id: job.status for job in all_jobs(session)} == dict.fromkeys(jobs, JobStatus.SUCCEEDED)


def all_jobs(session: Session) -> Sequence[Job]:
    return session.scalars(sa.select(Job), execution_options={"populate_existing": True}).all()


# --- Quarantine -------------------------------------------------------------------------------------------


def test_a_quarantined_worker_is_due_for_a_check_after_a_wait_that_grows(database: Database) -> None:
    waits: list[int] = []

    def wait(times: int) -> float:
        waits.append(times)
        return -1 if len(waits) == 3 else 60

    with database.transaction(write=True) as session:
        register_worker(session, "w1", [CPU])
        assert not worker_health(session, "w1", max_wait_seconds=600).quarantined
        for due in (False, False, True):
            quarantine(session, "w1", "The GPU is lost.", wait=wait)
            health = worker_health(session, "w1", max_wait_seconds=600)
            assert (health.quarantined, health.check_is_due, count_due_checks(session)) == (True, due, int(due))
        assert waits == [1, 2, 3]
        end_quarantine(session, "w1")
        assert not worker_health(session, "w1", max_wait_seconds=600).quarantined


def test_failures_are_counted_until_an_attempt_ends_well(database: Database) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "w1", [CPU])
        assert [record_failure(session, "w1") for _ in range(2)] == [1, 2]
        end_quarantine(session, "w1")
        assert record_failure(session, "w1") == 3
        record_success(session, "w1")
        assert record_failure(session, "w1") == 1
        assert record_failure(session, "nobody") == 0


def test_the_end_of_a_drain_lets_a_quarantined_worker_check_itself_at_once(database: Database) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "w1", [CPU])
        quarantine(session, "w1", "The GPU is lost.", wait=lambda _: 600)
        drain(session, "w1", None)
        assert worker_health(session, "w1", max_wait_seconds=600).check_is_due


def test_jobs_wait_for_quarantined_workers_by_that_reason(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        register_worker(session, "w1", [CPU])
        quarantine(session, "w1", "The GPU is lost.", wait=lambda _: 600)
        position = queue_position(session, job, worker_seconds=60)
        assert position is not None
        assert position.reason == "workers_quarantined"
