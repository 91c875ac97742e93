"""Transactions, the clock and the types, on both databases."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from threading import Event

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import exc

from domain.datasets.models import Dataset
from domain.db import Database, UtcDateTime, db_now
from tests.support.rows import insert_dataset

moments = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.timezones(no_cache=False) | st.just(UTC))


def count(database: Database) -> int:
    with database.transaction(write=False) as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Dataset)) or 0


def test_a_transaction_is_committed_at_its_end(database: Database) -> None:
    with database.transaction(write=True) as session:
        insert_dataset(session)
    assert count(database) == 1


def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    with suppress(RuntimeError), database.transaction(write=True) as session:
        insert_dataset(session)
        raise RuntimeError
    assert count(database) == 0


def test_rows_can_be_read_after_the_commit(database: Database) -> None:
    with database.transaction(write=True) as session:
        dataset = insert_dataset(session)
    assert dataset.rows == 100
    assert dataset.created_at.tzinfo is UTC


def test_a_reading_transaction_cannot_write(database: Database) -> None:
    with pytest.raises(exc.DBAPIError), database.transaction(write=False) as session:
        insert_dataset(session)
    assert count(database) == 0


def test_a_connection_of_a_read_transaction_can_write_afterwards(database: Database) -> None:
    # It comes back from the pool: neither mode sticks to it.
    for _ in range(3):
        count(database)
        with database.transaction(write=True) as session:
            insert_dataset(session)
    assert count(database) == 3


def test_a_reader_sees_one_snapshot_while_others_write(database: Database) -> None:
    with database.transaction(write=False) as reader:
        before = reader.scalars(sa.select(Dataset)).all()
        with database.transaction(write=True) as writer:
            insert_dataset(writer)
        assert reader.scalars(sa.select(Dataset)).all() == before == []
    assert count(database) == 1


def test_concurrent_read_modify_write_transactions_lose_no_update(database: Database) -> None:
    with database.transaction(write=True) as session:
        dataset_id = insert_dataset(session, rows=0).id

    def increment(_: int) -> None:
        with database.transaction(write=True) as session:
            row = session.get_one(Dataset, dataset_id, with_for_update=True)
            row.rows += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(increment, range(40)))
    with database.transaction(write=False) as session:
        assert session.get_one(Dataset, dataset_id).rows == 40


def test_a_connection_that_is_in_use_when_all_are_closed_is_closed_when_it_comes_back(database_url: str) -> None:
    database = Database(database_url)
    with database.transaction(write=False) as session:
        used = session.connection().connection.driver_connection
        database.close()
        session.scalar(sa.select(db_now()))
    with pytest.raises((sqlite3.ProgrammingError, psycopg.OperationalError)):
        used.execute("SELECT 1")  # type: ignore[union-attr]  # The drivers have no type in common.


def test_sqlite_writers_of_one_process_are_serialized(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'one.db'}")
    sent: list[str] = []
    second_began = Event()

    def record(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)
        if sent.count("PRAGMA query_only = OFF") == 2:
            second_began.set()

    def write() -> None:
        with database.transaction(write=True) as session:
            session.execute(sa.text("SELECT 'second'"))

    sa.event.listen(database.engine, "before_cursor_execute", record)
    with ThreadPoolExecutor(1) as pool:
        with suppress(RuntimeError), database.transaction(write=True) as session:
            session.execute(sa.text("SELECT 'first'"))
            second = pool.submit(write)
            second_began.wait()
            session.execute(sa.text("SELECT 'first again'"))
            raise RuntimeError
        second.result()
    database.close()
    # SQLite is not asked before, and would not let the next one in, but one that comes later.
    statements = [statement for statement in sent if not statement.startswith("PRAGMA")]
    assert statements == [
        "BEGIN IMMEDIATE",
        "SELECT 'first'",
        "SELECT 'first again'",
        "BEGIN IMMEDIATE",
        "SELECT 'second'",
    ]


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    wrote, may_end = Event(), Event()

    def write() -> None:
        with database.transaction(write=True) as session:
            insert_dataset(session)
            wrote.set()
            may_end.wait()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        wrote.wait()
        assert count(database) == 0
        may_end.set()
        writing.result()
    assert count(database) == 1


@given(moments)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_datetime_round_trips_to_the_microsecond_in_utc(database: Database, moment: datetime) -> None:
    with database.transaction(write=False) as session:
        read = session.scalar(sa.select(sa.literal(moment, UtcDateTime())))
    assert read == moment.astimezone(UTC)
    assert read is not None
    assert read.utcoffset() == timedelta(0)


def test_datetimes_compare_in_the_database_as_in_python(database: Database) -> None:
    base = datetime(2026, 1, 1, tzinfo=UTC)
    near = [
        base,
        base + timedelta(microseconds=1),
        base.astimezone(timezone(timedelta(hours=9))) - timedelta(seconds=1),
    ]
    with database.transaction(write=False) as session:
        for left in near:
            for right in near:
                less = sa.literal(left, UtcDateTime()) < sa.literal(right, UtcDateTime())
                assert session.scalar(sa.select(less)) == (left < right)


def test_a_datetime_without_a_time_zone_is_refused(database: Database) -> None:
    naive = sa.literal(datetime(2026, 1, 1), UtcDateTime())
    with pytest.raises(exc.StatementError, match="time zone"), database.transaction(write=False) as session:
        session.scalar(sa.select(naive))


def test_the_databases_clock_agrees_with_the_clock_of_the_process(database: Database) -> None:
    slack = timedelta(milliseconds=2)
    before = datetime.now(UTC)
    with database.transaction(write=False) as session:
        now = session.scalar(sa.select(db_now()))
    assert now is not None
    assert before - slack <= now <= datetime.now(UTC) + slack


@pytest.mark.parametrize("seconds", [-90.5, 0.25, 60, 86_400])
def test_the_clocks_offset_is_in_seconds(database: Database, seconds: float) -> None:
    with database.transaction(write=False) as session:
        now, later = session.execute(sa.select(db_now(), db_now(seconds))).one()
    assert abs((later - now).total_seconds() - seconds) < 0.01


def test_the_clock_runs_on_within_a_transaction(database: Database) -> None:
    with database.transaction(write=False) as session:
        first = session.scalar(sa.select(db_now()))
        while session.scalar(sa.select(db_now())) == first:
            pass
