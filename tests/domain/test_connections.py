"""Connections rely on no session and no default of the server, and wait for nothing for ever."""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.repository import list_checkpoints
from domain.connections import create_engine_for
from domain.database_errors import DatabaseFault, DatabaseUnavailable
from domain.datasets.models import Dataset
from domain.db import Database, db_now
from domain.idempotency.repository import KeyHolder, claim
from domain.schema import check_ready
from domain.settings import Settings
from tests.support.harness import ServiceHarness
from tests.support.rows import insert_dataset
from tests.support.servers import fresh_database
from tests.support.transaction_pooler import TransactionPooler, transaction_pooler
from tests.support.waiting import eventually

DEFAULTS = {
    "default_transaction_isolation": "serializable",
    "statement_timeout": "200",
    "lock_timeout": "1",
    "idle_in_transaction_session_timeout": "200",
    "DateStyle": "German",
    "TimeZone": "'Asia/Kathmandu'",
    "standard_conforming_strings": "off",
    "extra_float_digits": "-10",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
}
"""What an administrator, or another application of the role, may have set."""


@pytest.fixture
def postgres_url(postgres_server: str, postgres_template: str) -> Iterator[str]:
    with fresh_database(postgres_server, "connections", template=postgres_template) as url:
        yield url


@contextmanager
def opened(url: str | sa.URL) -> Iterator[Database]:
    database = Database(url if isinstance(url, str) else url.render_as_string(hide_password=False))
    try:
        yield database
    finally:
        database.close()


def set_default(url: str, name: str, value: str) -> None:
    parsed = sa.make_url(url)
    engine = sa.create_engine(parsed.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f'ALTER DATABASE "{parsed.database}" SET {name} = {value}'))
    engine.dispose()


def settings_within(session: Session) -> dict[str, str]:
    names = ("transaction_isolation", "statement_timeout", "lock_timeout", "DateStyle", "TimeZone", "client_encoding")
    return {name: str(session.scalar(sa.select(sa.func.current_setting(name)))) for name in names}


def test_no_default_of_the_server_reaches_a_transaction(postgres_url: str) -> None:
    with opened(postgres_url) as database, database.transaction(write=True) as session:
        expected = settings_within(session)
    for name, value in DEFAULTS.items():
        set_default(postgres_url, name, value)
    with opened(postgres_url) as database:
        with database.transaction(write=True) as session:
            assert settings_within(session) == expected
            session.execute(sa.select(sa.func.pg_sleep(0.3)))
            dataset = insert_dataset(session, name="ü 日本 \\' x")
        with database.transaction(write=False) as session:
            read = session.get_one(Dataset, dataset.id)
            now = session.scalar(sa.select(db_now()))
            assert session.scalar(sa.select(sa.literal(1 / 3, sa.Double()))) == 1 / 3
            assert session.scalar(sa.select(sa.func.current_setting("transaction_isolation"))) == "repeatable read"
        assert (read.name, read.created_at) == (dataset.name, dataset.created_at)
        assert now is not None
        assert abs((now - dataset.created_at).total_seconds()) < 60
    assert expected["transaction_isolation"] == "read committed"


def test_database_that_is_set_to_read_only_takes_no_writes_and_stays_readable(postgres_url: str) -> None:
    set_default(postgres_url, "default_transaction_read_only", "on")
    with opened(postgres_url) as database:
        with pytest.raises(DatabaseUnavailable) as raised, database.transaction(write=True) as session:
            insert_dataset(session)
        assert raised.value.fault is DatabaseFault.READ_ONLY
        with pytest.raises(DatabaseUnavailable) as raised:
            check_ready(database)
        assert raised.value.fault is DatabaseFault.READ_ONLY
        with database.transaction(write=False) as session:
            assert session.scalars(sa.select(Dataset)).all() == []
    set_default(postgres_url, "default_transaction_read_only", "off")
    with opened(postgres_url) as database:
        check_ready(database)


def test_connections_that_the_server_has_ended_fail_no_transaction(postgres_url: str) -> None:
    others = sa.text("SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname = :name")
    server = sa.create_engine(sa.make_url(postgres_url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with opened(postgres_url) as database, server.connect() as administrator:
        for _ in range(20):
            with database.transaction(write=False) as first, database.transaction(write=True) as second:
                for session in (first, second):
                    session.execute(sa.select(sa.func.pg_backend_pid()))
            ended = administrator.scalar(others, {"name": sa.make_url(postgres_url).database})
            assert ended == 2
            with database.transaction(write=False) as first, database.transaction(write=True) as second:
                for session in (first, second):
                    session.execute(sa.select(sa.func.pg_backend_pid()))
    server.dispose()


# --- A pooler that gives each transaction another session ---------------------------------------------


@pytest.fixture
def pooler(postgres_url: str) -> Iterator[TransactionPooler]:
    directory = Path(str(sa.make_url(postgres_url).query["host"]))
    with transaction_pooler(directory / ".s.PGSQL.5432") as pooler:
        yield pooler


@pytest.fixture
def pooled_url(postgres_url: str, pooler: TransactionPooler) -> str:
    pooled = sa.make_url(postgres_url).set(host="127.0.0.1", port=pooler.port, query={"sslmode": "disable"})
    return pooled.render_as_string(hide_password=False)


def test_transactions_in_changing_sessions_do_as_in_one(pooled_url: str) -> None:
    with opened(pooled_url) as database:
        sessions = set()
        for number in range(20):
            with database.transaction(write=True) as session:
                insert_dataset(session, rows=number)
            with database.transaction(write=False) as session:
                assert session.scalar(sa.select(sa.func.count()).select_from(Dataset)) == number + 1
                sessions.add(session.scalar(sa.select(sa.func.pg_backend_pid())))
            check_ready(database)
        assert len(sessions) > 1


def test_job_runs_to_its_end_over_changing_sessions(pooled_url: str, tmp_path: Path) -> None:
    harness = ServiceHarness(tmp_path / "home", pooled_url)
    job = harness.submit()
    assert str(harness.supervisor().work_one()) == "succeeded"
    with harness.database.transaction(write=False) as session:
        assert list_checkpoints(session, "default", job_id=job, limit=10).rows
    with harness.database.transaction(write=True) as session:
        assert claim(session.connection(), KeyHolder("p", "k", "t"), fingerprint="f", seconds=60) is None
    harness.close()


# --- A server that stands still -----------------------------------------------------------------------


def test_writer_that_is_frozen_within_a_transaction_keeps_nobody_longer_than_its_lease(postgres_url: str) -> None:
    with opened(postgres_url) as database, database.transaction(write=True) as session:
        name = "idle_in_transaction_session_timeout"
        held = session.scalars(sa.select(sa.cast(sa.func.current_setting(name), sa.Interval))).one()
    assert timedelta() < held < timedelta(seconds=Settings.model_fields["lease_seconds"].default)


def test_frozen_server_is_unavailable_within_seconds_and_usable_afterwards(
    pooled_url: str, pooler: TransactionPooler
) -> None:
    with opened(f"{pooled_url}&connect_timeout=2") as database:
        check_ready(database)
        pooler.thawed.clear()
        faults: list[DatabaseFault] = []

        def write() -> None:
            try:
                database.check_writable()
            except DatabaseUnavailable as error:
                faults.append(error.fault)

        clients = [threading.Thread(target=write) for _ in range(5)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(20)
        assert faults == [DatabaseFault.UNAVAILABLE] * 5
        pooler.thawed.set()
        eventually(lambda: is_ready(database), what="the server answers")


def is_ready(database: Database) -> bool:
    with suppress(DatabaseUnavailable):
        check_ready(database)
        return True
    return False


def test_new_file_to_which_another_process_writes_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "new.sqlite3"
    writer = sqlite3.connect(file, isolation_level=None)
    writer.execute("CREATE TABLE written (id INTEGER)")
    writer.execute("BEGIN IMMEDIATE")
    engine = create_engine_for(f"sqlite:///{file}")
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(engine.raw_connection)
        # SQLite itself refuses such a connection within microseconds.
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.2)
        writer.execute("COMMIT")
        connection = opening.result(timeout=60)
    assert connection.cursor().execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    engine.dispose()
    writer.close()
