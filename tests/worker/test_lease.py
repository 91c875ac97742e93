"""A lease is kept while the database is away, and never longer than nobody else can have the job."""

from contextlib import AbstractContextManager
from typing import cast

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from domain.db import Database
from domain.errors import LostLease
from domain.jobs import leases
from domain.jobs.leases import Claim
from tests.support.harness import Workshop
from worker.lease import Lease


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Away:
    """A database that cannot be reached."""

    def transaction(self, *, write: bool) -> AbstractContextManager[Session]:
        raise OperationalError("", {}, Exception(f"write={write}"))


def claimed(workshop: Workshop) -> Claim:
    workshop.submit()
    with workshop.database.transaction(write=True) as session:
        claim = leases.claim_next(session, worker="w", lease_seconds=60)
    assert claim is not None
    return claim


def test_a_lease_outlives_an_outage_that_is_shorter_than_itself(workshop: Workshop) -> None:
    claim, clock = claimed(workshop), Clock()
    lease = Lease(cast(Database, Away()), claim, seconds=60, every=10, clock=clock)
    for clock.now in range(10, 60, 10):
        assert lease.beat_if_due() == "ok"
    clock.now = 60
    with pytest.raises(LostLease):
        lease.beat_if_due()


def test_the_row_is_renewed_no_more_often_than_asked(workshop: Workshop) -> None:
    claim, clock = claimed(workshop), Clock()
    lease = Lease(workshop.database, claim, seconds=60, every=10, clock=clock)
    expiries = set()
    for clock.now in (1, 5, 9.9, 10, 19.9, 20):
        lease.beat_if_due()
        expiries.add(workshop.job(claim.job_id).lease_expires_at)
    assert len(expiries) == 3


def test_a_wish_of_the_client_arrives_with_the_next_heartbeat(workshop: Workshop) -> None:
    claim, clock = claimed(workshop), Clock()
    lease = Lease(workshop.database, claim, seconds=60, every=10, clock=clock)
    workshop.cancel(claim.job_id)
    assert lease.beat_if_due() == "ok"
    clock.now = 10
    assert lease.beat_if_due() == "cancel"


def test_something_long_runs_under_heartbeats(workshop: Workshop) -> None:
    claim, clock = claimed(workshop), Clock()
    lease = Lease(workshop.database, claim, seconds=1, every=0.01, clock=clock)
    before = workshop.job(claim.job_id).lease_expires_at

    def long() -> str:
        # Ends once heartbeats were seen from outside.
        while workshop.job(claim.job_id).lease_expires_at == before:
            clock.now += 1
        return "done"

    assert lease.during(long) == "done"


def test_what_goes_wrong_aside_comes_back(workshop: Workshop) -> None:
    lease = Lease(workshop.database, claimed(workshop), seconds=60, every=10)
    with pytest.raises(ZeroDivisionError):
        lease.during(lambda: 1 // 0)
