"""A lease survives an outage of the database, but never for longer than no other worker can have claimed the job."""

from contextlib import AbstractContextManager
from typing import cast

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from domain.db import Database
from domain.errors import LostLease
from domain.jobs import leases
from domain.jobs.leases import Claim
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
        raise OperationalError("", {}, Exception(f"write={write}"))


def claim_job(harness: ServiceHarness) -> Claim:
    harness.submit()
    with harness.database.transaction(write=True) as session:
        claim = leases.claim_next(session, worker="w", lease_seconds=60)
    assert claim is not None
    return claim


def test_lease_survives_an_outage_that_is_shorter_than_itself(harness: ServiceHarness) -> None:
    claim, clock = claim_job(harness), Clock()
    lease = Lease(cast(Database, UnreachableDatabase()), claim, seconds=60, interval=10, clock=clock)
    for clock.now in range(10, 60, 10):
        assert lease.heartbeat_if_due() is None
    clock.now = 60
    with pytest.raises(LostLease):
        lease.heartbeat_if_due()


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
