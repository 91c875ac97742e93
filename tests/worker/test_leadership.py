"""Which of several schedulers leads, and that one which was replaced writes nothing more."""

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from domain.db import Database
from domain.workers.models import DutyLease
from domain.workers.repository import list_schedulers, record_scheduler
from tests.support.harness import ServiceHarness
from worker.doorbell import BrokerUnreachable
from worker.leadership import LeaderDatabase, Leadership, LeadershipLost
from worker.scheduler import Scheduler

SECONDS = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Candidates:
    """Two schedulers, whose clock and leases pass by moving them."""

    def __init__(self, database: Database, url: str) -> None:
        self.database, self.clock = database, Clock()
        self.databases = {name: LeaderDatabase(url, name) for name in ("first", "second")}
        self.leaderships = {
            name: Leadership(database, duties, name, SECONDS, self.clock) for name, duties in self.databases.items()
        }

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        with self.database.transaction(write=True) as session:
            for lease in session.scalars(sa.select(DutyLease)):
                lease.expires_at -= timedelta(seconds=seconds)

    def renew(self, *names: str) -> list[bool]:
        for name in names:
            self.leaderships[name].renew()
        return [leadership.leads() for leadership in self.leaderships.values()]


@pytest.fixture
def candidates(database: Database, database_url: str) -> Iterator[Candidates]:
    candidates = Candidates(database, database_url)
    yield candidates
    for each in candidates.databases.values():
        each.close()


def test_one_leads_and_a_silent_leader_is_replaced_once_its_lease_has_expired(candidates: Candidates) -> None:
    assert candidates.renew("first", "second") == [True, False]
    candidates.pass_time(SECONDS - 1)
    assert candidates.renew("second") == [True, False]
    candidates.pass_time(2)
    # It knows by its own clock, before any other has taken its place.
    assert not candidates.leaderships["first"].leads()
    assert candidates.renew("second", "first") == [False, True]


def test_leader_that_was_replaced_writes_nothing_more(candidates: Candidates) -> None:
    candidates.renew("first")
    duties = candidates.databases["first"]
    with duties.transaction(write=True) as session:
        record_scheduler(session, "written", reaches_broker=True)
    candidates.pass_time(SECONDS + 1)
    # Late, and not replaced: what it does is done by no other.
    with duties.transaction(write=True) as session:
        record_scheduler(session, "late", reaches_broker=True)
    candidates.renew("second")
    with pytest.raises(LeadershipLost), duties.transaction(write=True) as session:
        record_scheduler(session, "never", reaches_broker=True)
    with duties.transaction(write=False) as session:
        assert [row.name for row in list_schedulers(session, limit=10).rows] == ["late", "written"]


def test_leader_whose_loop_is_stuck_is_replaced(candidates: Candidates) -> None:
    candidates.renew("first")
    for _ in range(90):
        candidates.pass_time(SECONDS - 1)
        candidates.leaderships["first"].renew()
        # The loop of the other one turns.
        candidates.leaderships["second"].leads()
    assert candidates.renew("second")[1]


def test_leader_that_ends_leaves_its_place_at_once(candidates: Candidates) -> None:
    with candidates.leaderships["first"].renewing():
        assert candidates.renew("second") == [True, False]
    assert candidates.renew("second") == [False, True]


def test_leader_without_a_broker_leaves_its_place_to_one_that_reaches_it(
    candidates: Candidates, harness: ServiceHarness
) -> None:
    def refuse() -> int:
        raise BrokerUnreachable

    scheduler = Scheduler(
        candidates.database,
        harness.store,
        SimpleNamespace(waiting=refuse),  # type: ignore[arg-type] # Stands for a doorbell.
        harness.settings,
        harness.options(),
        "first",
        candidates.leaderships["first"],
    )
    assert candidates.renew("first", "second") == [True, False]
    scheduler.report()
    assert candidates.renew("first") == [True, False], "there is no better one"
    with candidates.database.transaction(write=True) as session:
        record_scheduler(session, "second", reaches_broker=True)
    scheduler.report()
    assert candidates.renew("first", "second") == [False, True]
    with candidates.database.transaction(write=False) as session:
        states = list_schedulers(session, limit=10).rows
    assert [(each.name, each.leads, each.reaches_broker) for each in states] == [
        ("first", False, False),
        ("second", True, True),
    ]
