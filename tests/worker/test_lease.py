"""A lease survives any outage of the database, unless another worker has claimed the job when it is back."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.database_errors import DatabaseUnavailable
from domain.db import Database, db_now
from domain.errors import LostLease
from domain.jobs import leases
from domain.jobs.leases import Claim
from domain.jobs.models import Job
from domain.jobs.states import StopRequest
from tests.support.harness import ServiceHarness
from worker.lease import Lease


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class UnreachableDatabase:
    """A database that refuses every connection."""

    def transaction(self, *, write: bool) -> AbstractContextManager[Session]:
        raise DatabaseUnavailable(detail=f"write={write}")


def claim_next(harness: ServiceHarness) -> Claim:
    with harness.database.transaction(write=True) as session:
        claim = leases.claim_next(session, worker="other", lease_seconds=60)
    assert claim is not None
    return claim


def claim_job(harness: ServiceHarness) -> Claim:
    harness.submit()
    with harness.database.transaction(write=True) as session:
        claim = leases.claim_next(session, worker="w", lease_seconds=60)
    assert claim is not None
    return claim


class Outage:
    """A database that refuses every connection while `away`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.away = False

    def transaction(self, *, write: bool) -> AbstractContextManager[Session]:
        return (cast(Database, UnreachableDatabase()) if self.away else self._database).transaction(write=write)


@pytest.mark.parametrize("suspended", [False, True], ids=["database_unavailable", "worker_suspended"])
def test_lease_is_taken_up_again_after_a_silence_longer_than_itself(harness: ServiceHarness, suspended: bool) -> None:
    claim, clock, database = claim_job(harness), Clock(), Outage(harness.database)
    lease = Lease(cast(Database, database), claim, seconds=60, interval=10, clock=clock)
    if suspended:
        clock.now = 590
    else:
        database.away = True
        for clock.now in range(10, 600, 10):
            assert lease.heartbeat_if_due() is None
        database.away = False
    clock.now = 600
    assert lease.heartbeat_if_due() is None
    (event,) = harness.events(claim.job_id, "lease_resumed")
    reason = "worker_suspended" if suspended else "database_unavailable"
    assert event.data == {"attempt": 1, "reason": reason, "seconds": 600.0}
    assert harness.job(claim.job_id).attempts_spent == 1


def test_lease_that_another_worker_took_during_an_outage_is_lost(harness: ServiceHarness) -> None:
    claim, clock, database = claim_job(harness), Clock(), Outage(harness.database)
    lease = Lease(cast(Database, database), claim, seconds=60, interval=10, clock=clock)
    database.away = True
    clock.now = 100
    lease.heartbeat_if_due()
    with harness.database.transaction(write=True) as session:
        session.execute(sa.update(Job).values(lease_expires_at=db_now(-1)))
        leases.reap_expired(session)
    claim_next(harness)
    database.away = False
    clock.now = 110
    with pytest.raises(LostLease):
        lease.heartbeat_if_due()


def test_worker_that_shuts_down_waits_for_the_database_no_longer_than_a_lease(harness: ServiceHarness) -> None:
    claim, clock = claim_job(harness), Clock()
    database = cast(Database, UnreachableDatabase())
    lease = Lease(database, claim, seconds=60, interval=10, should_stop=lambda: True, clock=clock)
    for clock.now in range(10, 60, 10):
        assert lease.heartbeat_if_due() is None
    clock.now = 60
    with pytest.raises(LostLease):
        lease.heartbeat_if_due()


def test_running_time_counts_by_a_clock_that_is_never_set(harness: ServiceHarness) -> None:
    claim, clock = claim_job(harness), Clock()
    lease = Lease(harness.database, replace(claim, runtime_left_seconds=30), seconds=60, interval=10, clock=clock)
    with harness.database.transaction(write=True) as session:
        # The clock of the database was put an hour ahead.
        session.execute(sa.update(Job).values(runs_until=db_now(-3000)))
    clock.now = 29
    assert lease.heartbeat_if_due() is None
    clock.now = 30
    assert lease.heartbeat_if_due() is StopRequest.EXPIRE


def test_lease_is_renewed_no_more_often_than_its_interval(harness: ServiceHarness) -> None:
    claim, clock = claim_job(harness), Clock()
    lease = Lease(harness.database, claim, seconds=60, interval=10, clock=clock)
    expiries = set()
    for clock.now in (1, 5, 9.9, 10, 19.9, 20):
        lease.heartbeat_if_due()
        expiries.add(harness.job(claim.job_id).lease_expires_at)
    assert len(expiries) == 3


def test_stop_request_of_the_client_arrives_with_the_next_heartbeat(harness: ServiceHarness) -> None:
    claim, clock = claim_job(harness), Clock()
    lease = Lease(harness.database, claim, seconds=60, interval=10, clock=clock)
    harness.cancel(claim.job_id)
    assert lease.heartbeat_if_due() is None
    clock.now = 10
    assert lease.heartbeat_if_due() is StopRequest.CANCEL


def test_lease_is_renewed_while_long_work_runs(harness: ServiceHarness) -> None:
    claim, clock = claim_job(harness), Clock()
    lease = Lease(harness.database, claim, seconds=1, interval=0.01, clock=clock)
    before = harness.job(claim.job_id).lease_expires_at

    def long() -> str:
        # Ends once a heartbeat has renewed the row.
        while harness.job(claim.job_id).lease_expires_at == before:
            clock.now += 1
        return "done"

    assert lease.renew_while(long) == "done"


def test_exception_of_long_work_is_raised(harness: ServiceHarness) -> None:
    lease = Lease(harness.database, claim_job(harness), seconds=60, interval=10)
    with pytest.raises(ZeroDivisionError):
        lease.renew_while(lambda: 1 // 0)
