"""Leases that expired while no heartbeat could arrive are granted once more; others are reaped in their time.

Time passes, and the clock of the database is set, by moving every moment that the rows and the reaper know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.db import Database, db_now
from domain.errors import LostLease
from domain.jobs.leases import Claim, claim_next, heartbeat
from domain.jobs.models import Job
from domain.jobs.states import JobStatus
from tests.support.rows import add_job, claim_job, reload_job
from worker.reaper import Reaper

LEASE, INTERVAL = 60.0, 15.0


class SteppedClock:
    """A service whose time passes by moving every moment in the rows, and in the reaper, into the past."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.reaper = Reaper(database, LEASE, INTERVAL)

    def advance(self, seconds: float) -> None:
        """Let the clock of the database show so many seconds more; less than 0 puts it back."""
        shift = timedelta(seconds=seconds)
        with self.database.transaction(write=True) as session:
            for job in session.scalars(sa.select(Job)):
                for column in ("lease_expires_at", "not_before", "waits_until", "runs_until"):
                    moment: datetime | None = getattr(job, column)
                    if moment is not None:
                        setattr(job, column, moment - shift)
        if self.reaper.looked_at is not None:
            self.reaper.looked_at -= shift

    def beat(self, claim: Claim) -> None:
        with self.database.transaction(write=True) as session:
            heartbeat(session, claim, LEASE)

    def look_for(self, seconds: float) -> list[str]:
        """Let time pass, with looks of the reaper in between; the jobs that it reaped."""
        reaped = []
        while seconds > 0:
            self.advance(min(INTERVAL, seconds))
            seconds -= INTERVAL
            reaped += self.reaper.look()
        return reaped


@pytest.fixture
def clock(database: Database) -> SteppedClock:
    stepped = SteppedClock(database)
    stepped.reaper.look()
    return stepped


def test_worker_that_is_lost_is_noticed_within_a_lease_and_two_looks(clock: SteppedClock) -> None:
    claim = claim_job(clock.database, lease_seconds=LEASE)
    assert clock.look_for(LEASE - INTERVAL) == []
    assert clock.look_for(2 * INTERVAL) == [claim.job_id]


@pytest.mark.parametrize("silence", [LEASE + 1, 3600.0, 86400.0 * 30])
def test_attempt_outlives_a_suspended_machine_an_unavailable_database_and_a_clock_put_forward(
    clock: SteppedClock, silence: float
) -> None:
    claim = claim_job(clock.database, lease_seconds=LEASE)
    for _ in range(3):
        clock.look_for(2 * INTERVAL)
        clock.beat(claim)
        # No look and no heartbeat meanwhile; then the reaper is first.
        clock.advance(silence)
        assert clock.reaper.look() == []
        clock.beat(claim)
    assert reload_job(clock.database, claim).attempts_spent == 1
    # A worker that is lost after that is noticed as ever.
    assert clock.look_for(LEASE + 2 * INTERVAL) == [claim.job_id]


def test_worker_that_never_comes_back_from_the_silence_is_reaped_after_one_more_lease(clock: SteppedClock) -> None:
    claim = claim_job(clock.database, lease_seconds=LEASE)
    clock.advance(3600)
    assert clock.look_for(LEASE) == []
    assert clock.look_for(2 * INTERVAL) == [claim.job_id]
    with pytest.raises(LostLease):
        clock.beat(claim)


def test_lease_that_had_expired_before_the_silence_is_not_granted_again(clock: SteppedClock) -> None:
    claim = claim_job(clock.database, lease_seconds=-1)
    clock.reaper.looked_at = now(clock.database)
    clock.advance(3600)
    assert clock.reaper.look() == [claim.job_id]


def test_clock_that_is_put_back_does_not_keep_the_job_of_a_lost_worker(clock: SteppedClock) -> None:
    claim = claim_job(clock.database, lease_seconds=LEASE)
    clock.advance(-3600)
    assert clock.reaper.look() == []
    assert clock.look_for(LEASE + 2 * INTERVAL) == [claim.job_id]


def test_scheduler_that_starts_anew_grants_one_more_lease(clock: SteppedClock) -> None:
    claim = claim_job(clock.database, lease_seconds=-1)
    clock.reaper = Reaper(clock.database, LEASE, INTERVAL)
    assert clock.reaper.look() == []
    assert clock.look_for(LEASE + 2 * INTERVAL) == [claim.job_id]


def test_failed_commit_of_the_look_does_not_count_as_a_look(clock: SteppedClock) -> None:
    claim = claim_job(clock.database, lease_seconds=LEASE)
    clock.advance(3600)

    class Away(Database):
        @contextmanager
        def transaction(self, *, write: bool) -> Iterator[sa.orm.Session]:
            with super().transaction(write=write) as session:
                yield session
                raise ConnectionError

    away = Away(clock.database.engine.url.render_as_string(hide_password=False))
    clock.reaper.database = away
    with pytest.raises(ConnectionError):
        clock.reaper.look()
    away.close()
    clock.reaper.database = clock.database
    assert clock.reaper.look() == []
    assert reload_job(clock.database, claim).status is JobStatus.PREPARING


def test_limit_of_waiting_does_not_run_out_in_a_silence(clock: SteppedClock) -> None:
    with clock.database.transaction(write=True) as session:
        job = add_job(session, waits_until=session.scalars(sa.select(db_now(600))).one())
    clock.advance(3600)
    clock.reaper.look()
    with clock.database.transaction(write=True) as session:
        assert session.get_one(Job, job.id).status is JobStatus.QUEUED
    clock.look_for(600 + 2 * INTERVAL)
    with clock.database.transaction(write=True) as session:
        assert session.get_one(Job, job.id).status is JobStatus.FAILED


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([-7200, -60, 20, 61, 600, 7200]), max_size=6))
def test_no_step_of_the_clock_costs_an_attempt_of_a_worker_that_is_well(database: Database, steps: list[int]) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.delete(Job))
    clock = SteppedClock(database)
    clock.reaper.look()
    with database.transaction(write=True) as session:
        add_job(session)
        claim = claim_next(session, worker="w1", lease_seconds=LEASE)
    assert claim is not None
    for step in steps:
        clock.advance(step)
        clock.reaper.look()
        clock.beat(claim)
        clock.look_for(INTERVAL)
        clock.beat(claim)
    assert reload_job(database, claim).attempts_spent == 1


def now(database: Database) -> datetime:
    with database.transaction(write=False) as session:
        return session.scalars(sa.select(db_now())).one()
