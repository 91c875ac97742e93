"""The guarded writer."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import sqlalchemy as sa

from domain.db import Database
from domain.errors import Conflict, IllegalTransition, LostLease
from domain.jobs.models import Job, JobEvent
from domain.jobs.states import CANCELLED, SUCCEEDED, TRANSITIONS, JobStatus
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
            seen = numbers_of(database, claim.job_id)
            # At every moment: what is committed later never has a smaller number.
            assert seen == list(range(1, len(seen) + 1))
        assert [each.exception() for each in running] == [None] * WRITERS
    total = 1 + sum(WRITES * (1 + writer % 3) for writer in range(WRITERS))
    assert numbers_of(database, claim.job_id) == list(range(1, total + 1))
    assert reload_job(database, claim).event_seq == total


def numbers_of(database: Database, job_id: str) -> list[int]:
    with database.transaction(write=False) as session:
        return list(session.scalars(sa.select(JobEvent.seq).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))


def test_a_move_is_recorded_and_counted(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        moved = transition(session, job, JobStatus.CANCELLED, reason=CANCELLED)
        assert (moved.status, moved.version, moved.event_seq) == (JobStatus.CANCELLED, 2, 1)
        event = session.get_one(JobEvent, (job.id, 1))
    assert event.type == "status"
    assert event.data == {"from": "queued", "to": "cancelled", "attempt": 0, "reason": CANCELLED.as_json()}


def test_an_illegal_move_is_refused_with_the_allowed_ones(database: Database) -> None:
    with database.transaction(write=True) as session, pytest.raises(IllegalTransition) as refused:
        transition(session, add_job(session), JobStatus.RUNNING)
    assert set(refused.value.allowed) == TRANSITIONS[JobStatus.QUEUED]


def test_a_terminal_state_needs_a_reason_that_stands_for_it(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session)
        for reason in (None, SUCCEEDED):
            with pytest.raises(ValueError, match="needs a reason"):
                transition(session, job, JobStatus.CANCELLED, reason=reason)


def test_a_writer_that_read_an_older_version_changes_nothing(database: Database) -> None:
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


def test_a_token_that_is_not_the_holders_changes_nothing(database: Database) -> None:
    claim = claim_job(database)
    before = dump_tables(database)
    with database.transaction(write=True) as session:
        job = lock_claimed_job(session, claim.job_id, claim.token)
        with pytest.raises(LostLease):
            record_events(session, job, [NewEvent("warning", {})], token=claim.token + 1)
    assert dump_tables(database) == before


def test_a_move_that_is_rolled_back_leaves_no_event(database: Database) -> None:
    claim = claim_job(database)
    before = dump_tables(database)
    with suppress(RuntimeError), database.transaction(write=True) as session:
        transition(session, lock_claimed_job(session, claim.job_id, claim.token), JobStatus.RUNNING, token=claim.token)
        raise RuntimeError
    assert dump_tables(database) == before
