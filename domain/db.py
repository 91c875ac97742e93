"""The database: rows of SQLite and PostgreSQL alike, one transaction per request or task, one clock.

No function of the domain commits. A block under :meth:`Database.transaction` is committed at its end, and rolled back
if it raises.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from domain.connections import KIND_OPTION, MAX_CONNECTIONS, TransactionKind, create_engine_for
from domain.database_errors import translating_database_errors

Row = TypeVar("Row")
Kept = TypeVar("Kept")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


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


_KEPT: Final = "pocl_kept"
"""Key in the `info` of a session: what its database keeps."""


def kept_by_database(session: Session, kind: Callable[[], Kept]) -> Kept:
    """The one object of a class that the sessions of a :class:`Database` share; made by the first who asks.

    A session of no such database has its own.
    """
    # One operation of a dictionary: of two threads that both make one, the same is used by both.
    objects: dict[object, Any] = session.info.setdefault(_KEPT, {})
    kept: Kept | None = objects.get(kind)
    return objects.setdefault(kind, kind()) if kept is None else kept


class Database:
    """A pool of connections to one database; safe to share between threads, not between processes."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine_for(url)
        self._is_closed = False
        sa.event.listen(self.engine, "checkin", self._close_late)
        self._kept: dict[object, Any] = {}
        # Reads are of one snapshot on both databases, and neither lets a reader write by mistake.
        kinds: tuple[TransactionKind, ...] = ("read", "write", "probe")
        self._engines = {kind: self.engine.execution_options(**{KIND_OPTION: kind}) for kind in kinds}

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Session]:
        """One transaction: committed when the block ends, rolled back if it raises. Nothing is retried.

        A writer on SQLite takes the write lock with its first statement, waiting up to 15 s for it. On PostgreSQL a
        statement waits up to 10 s for a lock and works up to 15 s.

        Raises:
            DatabaseUnavailable: the database is at fault; after the commit was tried, it may have taken place.
        """
        with self._transaction("write" if write else "read") as session:
            yield session

    def check_writable(self) -> None:
        """Try a write that changes nothing, for two seconds at most.

        Raises:
            DatabaseUnavailable: the database takes no writes, or lacks the schema.
        """
        with self._transaction("probe") as session:
            # Neither a standby nor a database that is set to read only lets this statement begin.
            session.execute(sa.text("DELETE FROM alembic_version WHERE 1 = 0"))

    @contextmanager
    def _transaction(self, kind: TransactionKind) -> Iterator[Session]:
        with (
            translating_database_errors(writes=kind != "read"),
            Session(self._engines[kind], expire_on_commit=False, info={_KEPT: self._kept}) as session,
            session.begin(),
        ):
            yield session

    @property
    def connections_in_use(self) -> int:
        """The connections of the pool that a transaction has now."""
        pool = self.engine.pool
        return pool.checkedout() if isinstance(pool, sa.QueuePool) else 0

    @property
    def max_connections(self) -> int:
        """How many connections the pool opens at most."""
        return MAX_CONNECTIONS

    def close(self) -> None:
        """Close all connections. One that a thread still uses is closed once it comes back: the pool would keep it."""
        self._is_closed = True
        self.engine.dispose()

    def _close_late(self, _connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        """Close a connection that comes back after all others; the shape of SQLAlchemy's event `checkin`."""
        if self._is_closed:
            record.close()
