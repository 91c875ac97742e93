"""State transitions and other writes of a job: optimistic lock, fencing token, event numbers."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import sqlalchemy as sa

from domain.db import Database
from domain.errors import Conflict, IllegalTransition, LostLease
from domain.jobs.leases import settle
from domain.jobs.models import CLEARED_WITH_LEASE, Job, JobEvent
from domain.jobs.states import CANCELLED, SUCCEEDED, AttemptOutcome, JobStatus
from domain.jobs.transitions import NewEvent, lock_claimed_job, record_events, transition
from tests.support.rows import add_job, claim_job, dump_tables, reload_job

WRITERS, WRITES = 4, 12


def test_numbers_of_events_have_no_gap_under_concurrent_writers(database: Database) -> None:
    claim = claim_job(database)

    def write(writer: int) -> None:
        for number in range(WRITES):
            with database.transaction(write=True) as session:
                job = lock_claimed_job(session, claim.job_id, claim.token)
                # One, two or three events at once.
                events = [NewEvent("warning", {"writer": writer, "number": number})] * (1 + writer % 3)
                record_events(session, job, events, token=claim.token)

    with ThreadPoolExecutor(WRITERS) as pool:
        running = [pool.submit(write, writer) for writer in range(WRITERS)]
        while not all(each.done() for each in running):
            numbers = event_numbers(database, claim.job_id)
            # At every moment: what is committed later never has a smaller number.
            assert numbers == list(range(1, len(numbers) + 1))
        assert [each.exception() for each in running] == [None] * WRITERS
    total = 1 + sum(WRITES * (1 + writer % 3) for writer in range(WRITERS))
    assert event_numbers(database, claim.job_id) == list(range(1, total + 1))
    assert reload_job(database, claim).event_seq == total


def event_numbers(database: Database, job_id: str) -> list[int]:
    with database.transaction(write=False) as session:
        return list(session.scalars(sa.select(JobEvent.seq).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))


def test_a_transition_is_recorded_as_an_event_and_raises_the_version(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        updated = transition(session, job, JobStatus.CANCELLED, reason=CANCELLED)
        assert (updated.status, updated.version, updated.event_seq) == (JobStatus.CANCELLED, 2, 1)
        event = session.get_one(JobEvent, (job.id, 1))
    assert event.type == "status"
    assert event.data == {"from": "queued", "to": "cancelled", "attempt": 0, "reason": CANCELLED.as_json()}


def test_an_illegal_transition_is_refused_with_the_actions_that_are_allowed(database: Database) -> None:
    with database.transaction(write=True) as session, pytest.raises(IllegalTransition) as raised:
        transition(session, add_job(session), JobStatus.RUNNING)
    assert raised.value.allowed == ("cancel",)


def test_a_terminal_state_needs_a_reason_that_stands_for_it(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        for reason in (None, SUCCEEDED):
            with pytest.raises(ValueError, match="needs a reason"):
                transition(session, job, JobStatus.CANCELLED, reason=reason)


def test_a_write_with_a_stale_version_changes_nothing(database: Database) -> None:
    with database.transaction(write=True) as session:
        job_id = add_job(session).id
    with database.transaction(write=False) as session:
        stale = session.get_one(Job, job_id)
    with database.transaction(write=True) as session:
        session.execute(sa.update(Job).values(version=7))
    before = dump_tables(database)
    with pytest.raises(Conflict), database.transaction(write=True) as session:
        transition(session, stale, JobStatus.CANCELLED, reason=CANCELLED)
    assert dump_tables(database) == before


def test_a_write_with_a_stale_fencing_token_changes_nothing(database: Database) -> None:
    claim = claim_job(database)
    before = dump_tables(database)
    with database.transaction(write=True) as session:
        job = lock_claimed_job(session, claim.job_id, claim.token)
        with pytest.raises(LostLease):
            record_events(session, job, [NewEvent("warning", {})], token=claim.token + 1)
    assert dump_tables(database) == before


def test_a_transition_that_is_rolled_back_leaves_no_event(database: Database) -> None:
    claim = claim_job(database)
    before = dump_tables(database)
    with suppress(RuntimeError), database.transaction(write=True) as session:
        transition(session, lock_claimed_job(session, claim.job_id, claim.token), JobStatus.RUNNING, token=claim.token)
        raise RuntimeError
    assert dump_tables(database) == before


def test_columns_of_a_lease_are_null_once_it_is_released(database: Database) -> None:
    claim = claim_job(database)
    columns = {column.key for column in sa.inspect(Job).columns if column.info.get(CLEARED_WITH_LEASE)}
    assert {"lease_owner", "lease_token", "lease_expires_at", "phase", "eta_seconds", "pause_at"} <= columns
    with database.transaction(write=True) as session:
        session.execute(sa.update(Job).values(phase="training", eta_seconds=1.0, pause_at="now"))
        settle(session, claim, AttemptOutcome.released())
    job = reload_job(database, claim)
    assert {column: getattr(job, column) for column in columns} == dict.fromkeys(columns)
