"""The database: one engine for SQLite and PostgreSQL, one transaction per request or task, one clock.

No function of the domain commits. A block under :meth:`Database.transaction` is committed at its end, and rolled back
if it raises.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from domain.settings import Settings

Row = TypeVar("Row")

_BEGIN: Final = "pocl_begin"
"""Execution option: the mode in which SQLite begins a transaction."""
_HOLDS_WRITER_LOCK: Final = "pocl_holds_writer_lock"
"""Key in the `info` of an SQLite connection: whether it holds the writer lock of this process."""
_BUSY_MILLISECONDS: Final = 30_000
_CONNECT_SECONDS: Final = 10
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
# The key of an advisory lock, any number: two processes that start at once migrate one after the other.
_MIGRATION_LOCK: Final = 0x706F636C

DATABASE_UNAVAILABLE: Final = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)
"""The exceptions of a database that restarts, stays locked or cannot be reached."""


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A moment with its time zone, always UTC in Python.

    On SQLite it is an integer, the microseconds since 1970: SQLite has no type for moments, and texts of different
    precision do not compare as the moments do.
    """

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(sa.BigInteger() if dialect.name == "sqlite" else sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | int | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a moment needs its time zone")
        return (value - _EPOCH) // _MICROSECOND if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "sqlite":
            return _EPOCH + int(value) * _MICROSECOND
        moment: datetime = value
        return moment.astimezone(UTC)


class db_now(FunctionElement[datetime]):
    """The time by the database's clock, plus `offset_seconds`: leases are compared by this clock alone.

    It advances within a transaction, unlike SQL's `now()`.
    """

    type = UtcDateTime()
    name = "db_now"
    inherit_cache = True

    def __init__(self, offset_seconds: float = 0) -> None:
        super().__init__(sa.literal(float(offset_seconds), sa.Double()))


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: SQLCompiler, **options: Any) -> str:
    offset = compiler.process(element.clauses, **options)
    return f"(clock_timestamp() + make_interval(secs => {offset}))"


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **options: Any) -> str:
    # SQLite's clock ticks in milliseconds, which julianday carries exactly; unixepoch('subsec') needs 3.42.
    now = "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000"
    offset = compiler.process(element.clauses, **options)
    return f"({now} + CAST({offset} * 1000000 AS INTEGER))"


JsonType: Final = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
"""The type of a JSON column; Python's None is SQL's NULL."""


class Base(DeclarativeBase):
    """The declarative base of every row."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


@dataclass(frozen=True)
class KeysetPage(Generic[Row]):
    """A page of a list by keyset pagination: its rows, and whether more follow."""

    rows: Sequence[Row]
    has_more: bool


def fetch_page(session: Session, statement: sa.Select[Row], *, limit: int) -> KeysetPage[Row]:
    """The first `limit` rows of an ordered statement that begins after the last key of the page before."""
    rows = session.scalars(statement.limit(limit + 1)).all()
    return KeysetPage(rows[:limit], has_more=len(rows) > limit)


def upsert_into(connection: sa.Connection, record: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """An upsert to be: an INSERT with `on_conflict_do_update`, which both dialects have and common SQL does not."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return insert(record)


class Database:
    """A pool of connections to one database; safe to share between threads, not between processes."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine_for(url)
        is_sqlite = self.engine.dialect.name == "sqlite"
        self._write_engine = self.engine.execution_options(**({_BEGIN: "IMMEDIATE"} if is_sqlite else {}))
        # Reads are of one snapshot on both databases, and neither lets a reader write by mistake.
        self._read_engine = self.engine.execution_options(
            **(
                {_BEGIN: "DEFERRED"}
                if is_sqlite
                else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
            )
        )

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Session]:
        """One transaction: committed when the block ends, rolled back if it raises. Nothing is retried.

        A writer on SQLite takes the write lock with its first statement, waiting up to 30 s for it.

        Raises:
            sqlalchemy.exc.OperationalError: the database cannot be reached, or stayed locked.
        """
        engine = self._write_engine if write else self._read_engine
        with Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def create_engine_for(url: str) -> sa.Engine:
    """An engine for the URL; for SQLite with what keeps a file safe that several processes share."""
    if sa.make_url(url).get_backend_name() != "sqlite":
        return sa.create_engine(
            url, pool_size=10, max_overflow=30, pool_pre_ping=True, connect_args={"connect_timeout": _CONNECT_SECONDS}
        )
    # With isolation_level None the driver begins no transaction by itself, so the listeners below decide.
    engine = sa.create_engine(
        url,
        pool_size=10,
        max_overflow=30,
        connect_args={"isolation_level": None, "timeout": _BUSY_MILLISECONDS / 1000},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    lock = _SqliteWriterLock()
    event.listen(engine, "begin", lock.begin)
    event.listen(engine, "commit", lock.end)
    event.listen(engine, "rollback", lock.end)
    return engine


def upgrade(settings: Settings) -> None:
    """Bring the database and `home` to the newest version, making `home` and an SQLite file where there is none.

    Safe to call from several processes at once, and again.

    Raises:
        sqlalchemy.exc.OperationalError: the database cannot be reached, or stayed locked.
        OSError: a directory could not be made or renamed; the database is then as it was.
    """
    url = sa.make_url(settings.database_url)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine_for(settings.database_url)
    try:
        with engine.execution_options(**{_BEGIN: "IMMEDIATE"}).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config = alembic.config.Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
            alembic.command.upgrade(config, "head")
            # Still under the lock: one process renames, and the others find it done.
            _rename_former_artifact_root(settings)
    finally:
        engine.dispose()


def _rename_former_artifact_root(settings: Settings) -> None:
    """Give the artifact store of an older version its present name. Rows hold keys relative to the store."""
    former, present = settings.home / "artefacts", settings.home / "artifacts"
    if settings.artifact_root == present and former.is_dir() and not present.exists():
        former.rename(present)


def _migrations() -> Path:
    # The directory is found as a package, so from a checkout and from an installation alike.
    spec = find_spec("migrations")
    directories = [Path(path) for path in (spec.submodule_search_locations or ())] if spec is not None else []
    return next(directory for directory in directories if (directory / "env.py").is_file())


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {_BUSY_MILLISECONDS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class _SqliteWriterLock:
    """Serializes the write transactions of this process, before they compete for SQLite's lock.

    SQLite lets writers poll for its lock with growing pauses, so that the one that has waited longest comes last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def begin(self, connection: sa.Connection) -> None:
        # A writer that begins deferred and upgrades its lock later fails at once where another one writes.
        begin = connection.get_execution_options().get(_BEGIN, "IMMEDIATE")
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if begin == 'DEFERRED' else 'OFF'}")
        if begin != "DEFERRED":
            # Without the lock the statement below waits in vain, and SQLite reports that it is locked.
            connection.info[_HOLDS_WRITER_LOCK] = self._lock.acquire(timeout=_BUSY_MILLISECONDS / 1000)
        try:
            connection.exec_driver_sql(f"BEGIN {begin}")
        except BaseException:
            self.end(connection)
            raise

    def end(self, connection: sa.Connection) -> None:
        if connection.info.pop(_HOLDS_WRITER_LOCK, False):
            self._lock.release()
