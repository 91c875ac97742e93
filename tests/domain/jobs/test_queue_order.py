"""The order of the queue over many jobs: what a claim reads, and how often positions are counted."""

import itertools
import sqlite3
from contextlib import ExitStack
from datetime import timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.db import Database, db_now
from domain.ids import new_id
from domain.jobs.leases import claim_next
from domain.jobs.models import Job
from domain.jobs.queue import queue_position
from domain.jobs.queue_order import PositionCounter
from domain.jobs.states import JobStatus
from domain.workers.models import Device
from domain.workers.repository import register_worker
from tests.support.rows import add_job

_STEPS_PER_CALL = 10


def add_queued(database: Database, count: int) -> None:
    """So many jobs in the queue, of five projects."""
    with database.transaction(write=True) as session:
        like = add_job(session, id="job_like", project="none", status=JobStatus.SUCCEEDED)
        shared = {"posted_spec": like.posted_spec, "spec": like.spec}
        rows = [
            {"id": f"job_{number:06}", "project": f"p{number % 5}", "priority": number % 3, **shared}
            for number in range(count)
        ]
        session.execute(sa.insert(Job), rows)


def work_of_a_claim(database: Database) -> int:
    """What a claim costs: instructions of SQLite's virtual machine, or rows that PostgreSQL reads of the jobs."""
    calls = itertools.count()
    with database.transaction(write=True) as session:
        connection = session.connection()
        driver = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            driver.set_progress_handler(lambda: next(calls) and 0, _STEPS_PER_CALL)
        else:
            connection.execute(sa.text("ANALYZE jobs"))
        before = 0 if isinstance(driver, sqlite3.Connection) else rows_read(connection)
        assert claim_next(session, worker="w", lease_seconds=60) is not None
        if isinstance(driver, sqlite3.Connection):
            driver.set_progress_handler(None, 0)
            return next(calls) * _STEPS_PER_CALL
        return rows_read(connection) - before


def rows_read(connection: sa.Connection) -> int:
    statistics = sa.text("SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'jobs'")
    return int(connection.scalar(statistics) or 0)


def test_a_claim_reads_as_much_in_a_long_queue_as_in_a_short_one(database: Database) -> None:
    add_queued(database, 200)
    few = work_of_a_claim(database)
    with database.transaction(write=True) as session:
        session.execute(sa.delete(Job))
    add_queued(database, 3000)
    # A planner may read a short queue as it stands.
    assert work_of_a_claim(database) < 1.5 * few


def test_no_index_is_over_what_a_heartbeat_or_an_event_changes() -> None:
    """So that PostgreSQL writes no index entry for them (heap-only tuples)."""
    table = sa.inspect(Job).local_table
    assert isinstance(table, sa.Table)
    indexed = {column.key for index in table.indexes for column in index.columns}
    written = {"lease_expires_at", "version", "event_seq", "updated_at", "events_offset", "step", "percent"}
    assert not indexed & {*written, "progress_at", "phase", "phase_done", "tokens_seen", "eta_seconds"}


def test_positions_in_a_long_queue_are_counted_a_twentieth_of_the_time(database: Database) -> None:
    add_queued(database, 10)
    now = itertools.count()
    # Every look at the clock is a second after the last.
    counter = PositionCounter(clock=lambda: float(next(now)), long_queue=10)
    first, newer = "job_000000", "job_000009"
    with database.transaction(write=True) as session:
        ahead = counter.count_ahead(session, [first, newer])
        session.execute(sa.update(Job).where(Job.id == first).values(status=JobStatus.CANCELLED))
        # Still what was counted over the whole queue.
        assert counter.count_ahead(session, [first, newer]) == ahead
        answers = [counter.count_ahead(session, [newer])[newer] for _ in range(60)]
    assert set(answers) == {ahead[newer], ahead[newer] - 1}
    assert answers.index(ahead[newer] - 1) > 15


def test_positions_in_a_short_queue_are_always_counted(database: Database) -> None:
    add_queued(database, 9)
    now = itertools.count()
    counter = PositionCounter(clock=lambda: float(next(now)), long_queue=10)
    with database.transaction(write=True) as session:
        for number in range(9):
            ids = [f"job_{each:06}" for each in range(number, 9)]
            ahead = counter.count_ahead(session, ids)
            assert sorted(ahead.values()) == list(range(9 - number))
            session.execute(sa.update(Job).where(Job.id == ids[0]).values(status=JobStatus.CANCELLED))


JOBS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 2), st.sampled_from(["queued", "held", "backs_off"])),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=JOBS, newest=st.tuples(st.sampled_from(["a", "b", "d"]), st.integers(0, 2)))
def test_the_place_of_the_newest_job_follows_from_counts(
    database: Database, jobs: list[tuple[str, int, str]], newest: tuple[str, int]
) -> None:
    """It is the place that numbering the whole queue gives, in a short queue and in a long one."""
    with database.transaction(write=True) as session:
        session.execute(sa.delete(Job))
        now = session.scalars(sa.select(db_now())).one()
        for number, (project, priority, state) in enumerate(jobs):
            add_job(
                session,
                id=f"job_{number:06}",
                project=project,
                priority=priority,
                status=JobStatus.PREPARING if state == "held" else JobStatus.QUEUED,
                not_before=now + timedelta(hours=1) if state == "backs_off" else None,
                created_at=now + timedelta(seconds=number - 100),
            )
        project, priority = newest
        counters = PositionCounter(), PositionCounter(clock=lambda: 0.0, long_queue=0)
        counters[1].count_ahead(session, [])
        foreseen = [counter.count_ahead_of_newest(session, project, [priority]) for counter in counters]
        job = add_job(session, id="job_999999", project=project, priority=priority, created_at=now)
        assert foreseen == [[PositionCounter().count_ahead(session, [job.id])[job.id]]] * 2
        session.rollback()


def test_a_list_of_a_long_queue_is_that_of_a_short_one(database: Database) -> None:
    add_queued(database, 60)
    ticks = itertools.count()
    counter = PositionCounter(clock=lambda: float(next(ticks)), long_queue=10)
    with database.transaction(write=True) as session:
        expected = PositionCounter().list_places(session, "p1", after=0, limit=100)
        assert len(expected) == 12
        counter.count_ahead(session, [])
        for after, limit in itertools.product((0, 3, max(expected.values())), (1, 5, 100)):
            part = [(job_id, ahead) for job_id, ahead in expected.items() if ahead >= after][:limit]
            assert list(counter.list_places(session, "p1", after=after, limit=limit).items()) == part
        # What was counted is used again, yet a job that was claimed is gone, and one that came is there.
        first, *others = expected
        session.execute(sa.update(Job).where(Job.id == first).values(status=JobStatus.CANCELLED))
        add_job(session, id="job_999999", project="p1")
        assert sorted(counter.list_places(session, "p1", after=0, limit=100)) == sorted([*others, "job_999999"])


def test_two_claims_at_once_keep_the_order_of_priorities(database: Database) -> None:
    """The second gets the next urgent job, not the first job of another project."""
    if database.engine.dialect.name == "sqlite":
        pytest.skip("writers take turns on SQLite")
    with database.transaction(write=True) as session:
        for job_id, project, priority in (("job_a", "a", 5), ("job_b", "a", 5), ("job_c", "c", 0)):
            add_job(session, id=job_id, project=project, priority=priority)
    claimed = []
    with ExitStack() as stack:
        for _ in range(3):
            session = stack.enter_context(database.transaction(write=True))
            claim = claim_next(session, worker="w", lease_seconds=60)
            claimed.append(None if claim is None else claim.job_id)
    assert claimed == ["job_a", "job_b", "job_c"]


def test_an_estimate_reads_the_jobs_that_succeeded_last_alone(database: Database) -> None:
    def work() -> int:
        calls = itertools.count()
        with database.transaction(write=True) as session:
            driver = session.connection().connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            driver.set_progress_handler(lambda: next(calls) and 0, _STEPS_PER_CALL)
            assert queue_position(session, session.get_one(Job, "job_000000"), worker_seconds=60) is not None
            driver.set_progress_handler(None, 0)
        return next(calls)

    if database.engine.dialect.name != "sqlite":
        pytest.skip("the instructions of SQLite are counted")
    add_queued(database, 1)
    works = []
    for ended in (100, 3000):
        with database.transaction(write=True) as session:
            register_worker(session, "w1", [Device("cpu", "CPU", 8 << 30)])
            like = session.get_one(Job, "job_000000")
            now = session.scalars(sa.select(db_now())).one()
            shared = {"posted_spec": like.posted_spec, "spec": like.spec, "status": JobStatus.SUCCEEDED}
            moments = {"started_at": now - timedelta(hours=1), "finished_at": now}
            session.execute(sa.insert(Job), [{"id": new_id("job"), **shared, **moments} for _ in range(ended)])
        works.append(work())
    assert works[1] < 1.5 * works[0]
