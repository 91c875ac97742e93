"""A database that this version cannot use is refused in a sentence."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from domain.connections import create_engine_for
from domain.database_errors import DatabaseFault, DatabaseUnavailable
from domain.db import Database
from domain.schema import DatabaseRefused, check_database, check_ready, refusal_sentence, upgrade
from domain.settings import Settings


def change_revision(database_url: str, revision: str) -> None:
    engine = create_engine_for(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    engine.dispose()


def test_newer_schema_is_refused_and_left_as_it_is(database_url: str, database: Database, tmp_path: Path) -> None:
    change_revision(database_url, "0999")
    with pytest.raises(DatabaseRefused, match=r"POCL_DATABASE_URL.*0999.*newer version"):
        upgrade(Settings(home=tmp_path, database_url=database_url))
    with pytest.raises(DatabaseRefused, match=r"POCL_DATABASE_URL.*0999.*newer version"):
        check_database(database)
    # A process that runs already goes on: an upgrade of many processes takes a while.
    check_ready(database)


def test_older_schema_is_not_ready(database_url: str, database: Database) -> None:
    check_ready(database)
    change_revision(database_url, "0001")
    check_database(database)
    with pytest.raises(DatabaseUnavailable, match="migrate") as raised:
        check_ready(database)
    assert raised.value.fault is DatabaseFault.SCHEMA


def test_database_without_a_schema_is_not_ready(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    check_database(database)
    with pytest.raises(DatabaseUnavailable) as raised:
        check_ready(database)
    assert raised.value.fault is DatabaseFault.SCHEMA
    database.close()


def test_damaged_file_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "pocl.sqlite3").write_bytes(b"this is no database" * 400)
    with pytest.raises(DatabaseUnavailable) as raised:
        upgrade(Settings(home=tmp_path))
    assert refusal_sentence(raised.value).startswith("POCL_DATABASE_URL: The database is damaged")
    assert (tmp_path / "pocl.sqlite3").read_bytes() == b"this is no database" * 400


@pytest.fixture
def server_connection(postgres_server: str) -> Iterator[psycopg.Connection[object]]:
    url = sa.make_url(postgres_server).set(drivername="postgresql").render_as_string(hide_password=False)
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        yield connection


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_encoding_that_cannot_hold_all_texts_is_refused(
    postgres_server: str, server_connection: psycopg.Connection[object], tmp_path: Path, encoding: str
) -> None:
    name = f"of_{encoding.lower()}"
    server_connection.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0".encode())
    url = sa.make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    database = Database(url)
    try:
        with pytest.raises(DatabaseRefused, match=f"{encoding}, and must be UTF8"):
            upgrade(Settings(home=tmp_path, database_url=url))
        with pytest.raises(DatabaseRefused, match=f"{encoding}, and must be UTF8"):
            check_database(database)
    finally:
        database.close()
        server_connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_search_path_without_a_schema_is_refused(
    postgres_server: str, server_connection: psycopg.Connection[object], tmp_path: Path
) -> None:
    server_connection.execute(b"CREATE DATABASE nowhere TEMPLATE template0")
    server_connection.execute(b"ALTER DATABASE nowhere SET search_path = gone")
    url = sa.make_url(postgres_server).set(database="nowhere").render_as_string(hide_password=False)
    try:
        with pytest.raises(DatabaseRefused, match="search_path"):
            upgrade(Settings(home=tmp_path, database_url=url))
    finally:
        server_connection.execute(b"DROP DATABASE nowhere WITH (FORCE)")


def test_full_write_ahead_log_is_reserved_when_a_file_is_opened(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    upgrade(settings)
    database = Database(settings.database_url)
    with database.transaction(write=False) as session:
        session.scalar(sa.text("SELECT 1 FROM alembic_version"))
        log = (tmp_path / "pocl.sqlite3-wal").stat()
    assert log.st_blocks * 512 >= 16 * 2**20
    assert log.st_size < 2**20
    database.close()
    with closing(sqlite3.connect(tmp_path / "pocl.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
