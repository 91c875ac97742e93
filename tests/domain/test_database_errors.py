"""Whatever a database does to a program that is itself right is told from an error of the program."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import psycopg.errors
import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session

from domain.database_errors import SENTENCES, DatabaseFault, DatabaseUnavailable, classify, translating_database_errors
from domain.db import Database
from tests.support.rows import insert_dataset

CODES = sorted(
    code
    for code in (getattr(error, "sqlstate", None) for error in vars(psycopg.errors).values() if isinstance(error, type))
    if isinstance(code, str)
)
"""The code of every error that the driver knows."""
FAULTS = {
    "08006": DatabaseFault.UNAVAILABLE,
    "0A000": DatabaseFault.UNAVAILABLE,
    "25006": DatabaseFault.READ_ONLY,
    "25P03": DatabaseFault.UNAVAILABLE,
    "26000": DatabaseFault.UNAVAILABLE,
    "28P01": DatabaseFault.REFUSED,
    "3D000": DatabaseFault.REFUSED,
    "40000": DatabaseFault.CONFLICT,
    "40001": DatabaseFault.CONFLICT,
    "40003": DatabaseFault.UNAVAILABLE,
    "40P01": DatabaseFault.CONFLICT,
    "42501": DatabaseFault.REFUSED,
    "42P01": DatabaseFault.SCHEMA,
    "42703": DatabaseFault.SCHEMA,
    "42P05": DatabaseFault.UNAVAILABLE,
    "53100": DatabaseFault.FULL,
    "53200": DatabaseFault.UNAVAILABLE,
    "53300": DatabaseFault.UNAVAILABLE,
    "55000": DatabaseFault.UNAVAILABLE,
    "55P03": DatabaseFault.UNAVAILABLE,
    "57014": DatabaseFault.UNAVAILABLE,
    "57P01": DatabaseFault.UNAVAILABLE,
    "57P02": DatabaseFault.UNAVAILABLE,
    "57P03": DatabaseFault.UNAVAILABLE,
    "57P05": DatabaseFault.UNAVAILABLE,
    "58030": DatabaseFault.UNAVAILABLE,
    "72000": DatabaseFault.CONFLICT,
    "XX000": DatabaseFault.UNAVAILABLE,
    "XX001": DatabaseFault.DAMAGED,
}
OF_THE_PROGRAM = ("02", "03", "0Z", "21", "22", "23", "2F", "34", "42", "44", "54")
"""Classes of errors of a statement and its values."""
FAILED_BEFORE = ("25P02", "40002")
"""A statement after one that failed in the same transaction, and a constraint that is broken at its end."""


def wrapped(error: Exception) -> exc.DBAPIError:
    """The error as SQLAlchemy raises it."""
    kind = next(kind for kind in type(error).__mro__ if kind.__name__ in dir(exc) and issubclass(kind, Exception))
    made: exc.DBAPIError = getattr(exc, kind.__name__)("SELECT", {}, error)
    return made


@pytest.mark.parametrize("code", CODES)
def test_every_code_of_postgresql_means_what_it_says(code: str) -> None:
    fault = classify(wrapped(psycopg.errors.lookup(code)("as the server says it")))
    if code in FAULTS:
        assert fault is FAULTS[code]
    else:
        assert (fault is None) is (code in FAILED_BEFORE or code[:2] in OF_THE_PROGRAM)


def test_a_code_of_a_later_server_is_no_error_of_the_program() -> None:
    said = psycopg.errors.lookup("57014")("as the server says it")
    said.sqlstate = "ZZ123"
    assert classify(wrapped(said)) is DatabaseFault.UNAVAILABLE


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (psycopg.OperationalError("SSL SYSCALL error: EOF detected"), DatabaseFault.UNAVAILABLE),
        (psycopg.OperationalError("the connection is closed"), DatabaseFault.UNAVAILABLE),
        (psycopg.InterfaceError("cursor is closed"), DatabaseFault.UNAVAILABLE),
        (psycopg.InternalError("got result PGRES_COPY_IN"), DatabaseFault.UNAVAILABLE),
        (psycopg.DatabaseError("lost synchronization with server"), DatabaseFault.UNAVAILABLE),
        (psycopg.ProgrammingError("the query has 1 placeholder but 0 parameters were passed"), None),
        (psycopg.DataError("cannot dump NUL"), None),
        (psycopg.NotSupportedError("pipeline"), None),
        (sqlite3.ProgrammingError("Incorrect number of bindings supplied"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_driver_says_by_itself_is_of_the_connection_or_of_the_call(
    error: Exception, fault: DatabaseFault | None
) -> None:
    assert classify(wrapped(error)) is fault


def test_pool_without_a_free_connection_is_unavailable() -> None:
    assert classify(exc.TimeoutError("QueuePool limit")) is DatabaseFault.UNAVAILABLE
    assert classify(exc.PendingRollbackError("Can't reconnect")) is DatabaseFault.UNAVAILABLE
    assert classify(ValueError("of the program")) is None


def test_each_fault_has_a_sentence_that_names_no_place() -> None:
    assert set(SENTENCES) == set(DatabaseFault)
    assert all("/" not in sentence and sentence.endswith(".") for sentence in SENTENCES.values())


# --- SQLite as it really fails ------------------------------------------------------------------------


@pytest.fixture
def file(sqlite_template: Path, tmp_path: Path) -> Path:
    file = tmp_path / "some.sqlite3"
    file.write_bytes(sqlite_template.read_bytes())
    return file


@contextmanager
def opened(file: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{file}")
    try:
        yield database
    finally:
        database.close()


def fault_of_a_write(database: Database) -> DatabaseUnavailable:
    with pytest.raises(DatabaseUnavailable) as raised, database.transaction(write=True) as session:
        insert_dataset(session)
    return raised.value


@pytest.mark.parametrize("content", [b"this is no database" * 400, b"SQLite format 3\0" + b"\xff" * 4096])
def test_file_that_is_no_database_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "no.db").write_bytes(content)
    with opened(tmp_path / "no.db") as database:
        assert fault_of_a_write(database).fault is DatabaseFault.DAMAGED


def test_overwritten_pages_are_damage(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as out:
        out.seek(4096)
        out.write(b"\xff" * (size - 4096))
    with opened(file) as database:
        assert fault_of_a_write(database).fault is DatabaseFault.DAMAGED


def test_missing_directory_is_unavailable_and_a_missing_table_is_the_schema(tmp_path: Path) -> None:
    with opened(tmp_path / "gone" / "no.db") as database:
        assert fault_of_a_write(database).fault is DatabaseFault.UNAVAILABLE
    with opened(tmp_path / "empty.db") as database:
        assert fault_of_a_write(database).fault is DatabaseFault.SCHEMA


@pytest.mark.parametrize(
    "statement",
    ["SELECT 1 FROM absent", "SELECT absent FROM datasets", "INSERT INTO datasets (absent) VALUES (1)"],
    ids=["table", "column that is read", "column that is written"],
)
def test_what_an_older_schema_lacks_is_the_schema(database: Database, statement: str) -> None:
    with pytest.raises(DatabaseUnavailable) as raised, database.transaction(write=True) as session:
        session.execute(sa.text(statement))
    assert raised.value.fault is DatabaseFault.SCHEMA


def test_full_database_is_full(file: Path) -> None:
    def write_much(database: Database) -> None:
        with database.transaction(write=True) as session:
            session.execute(sa.text("PRAGMA max_page_count = 1"))
            for _ in range(100):
                insert_dataset(session, name="x" * 200)

    with opened(file) as database, pytest.raises(DatabaseUnavailable) as raised:
        write_much(database)
    assert raised.value.fault is DatabaseFault.FULL


def test_locked_file_is_unavailable_after_two_seconds_of_a_probe(file: Path) -> None:
    with opened(file) as database, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable) as raised:
            database.check_writable()
        assert raised.value.fault is DatabaseFault.UNAVAILABLE
        other.execute("ROLLBACK")
        database.check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every file")
def test_file_without_permission_to_write_is_read_only(file: Path) -> None:
    file.chmod(0o400)
    with opened(file) as database:
        assert fault_of_a_write(database).fault in (DatabaseFault.READ_ONLY, DatabaseFault.UNAVAILABLE)


def test_errors_of_the_program_pass_unchanged(database: Database) -> None:
    for statement in ("SELECT * FROM", "INSERT INTO alembic_version VALUES (NULL)"):
        with pytest.raises(exc.DBAPIError), database.transaction(write=True) as session:
            session.execute(sa.text(statement))


def test_translation_keeps_the_first_line_of_the_driver_and_no_statement() -> None:
    said = psycopg.errors.lookup("53300")("too many clients already\nDETAIL: none left")
    with pytest.raises(DatabaseUnavailable) as raised, translating_database_errors():
        raise exc.OperationalError("SELECT secret", {"secret": 1}, said)
    assert raised.value.detail == "too many clients already"
    assert "secret" not in str(raised.value)


def test_body_that_swallows_an_error_of_the_connection_is_still_unavailable(database: Database) -> None:
    def lose(session: Session) -> None:
        session.connection().invalidate()
        session.execute(sa.text("SELECT 1"))

    with pytest.raises(DatabaseUnavailable), database.transaction(write=True) as session:
        lose(session)
