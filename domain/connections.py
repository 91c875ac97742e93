"""Connections to SQLite and PostgreSQL: how each transaction begins, and how long anything waits.

No transaction relies on what a session or a database was told before: isolation, time limits and formats are part of
its beginning, and end with it. So it does not matter what defaults a role or a database has, or whether a pooler gives
each transaction another session of the server.
"""

import ctypes
import os
import select
import sqlite3
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.pool import ConnectionPoolEntry

from domain.database_errors import DatabaseUnavailable

Result = TypeVar("Result")
TransactionKind = Literal["read", "write", "probe", "migration"]

KIND_OPTION: Final = "pocl_transaction"
"""Execution option: the :data:`TransactionKind` of the transactions of an engine; `write` where it is left out."""
LOCK_SECONDS: Final = 10.0
"""How long a statement on PostgreSQL waits for a lock."""

_CONNECT_SECONDS: Final = 5
_PING_SECONDS: Final = 3.0
"""How long a connection waits for the answers that need no work: whether the server is there, and BEGIN."""
_TRUSTED_SECONDS: Final = 1.0
"""How long after its last use a connection is taken to be there unless the server has said that it is not."""
_RETURNED_AT: Final = "pocl_returned_at"
"""Key in the `info` of a PostgreSQL connection: when it came back to the pool, on the monotonic clock."""
_STATEMENT_SECONDS: Final = 15.0
_PROBE_SECONDS: Final = 2.0
_ANSWER_MARGIN_SECONDS: Final = 3.0
"""How much later than the server, which ends the statement, this side gives up: then the server itself stands still."""
_IDLE_SECONDS: Final = 60.0
"""How long a transaction may be idle between two statements."""
_IDLE_WRITER_SECONDS: Final = 20.0
"""The same for one that may hold locks: a process that is frozen within it keeps others waiting no longer."""
_GATE_SECONDS: Final = 1.0
_SQLITE_WRITE_SECONDS: Final = 15.0
"""How long a writer on SQLite waits for the others, those of this process and of others together."""
_SQLITE_LOCK_SECONDS: Final[Mapping[str, float]] = {"probe": _PROBE_SECONDS, "migration": 600.0}
"""The kinds of transactions that wait otherwise."""
_WAL_RETRY_SECONDS: Final = 0.02
_SQLITE_RESERVE_BYTES: Final = 16 * 2**20
_FALLOC_FL_KEEP_SIZE: Final = 1
_HOLDS_WRITER_LOCK: Final = "pocl_holds_writer_lock"
"""Key in the `info` of an SQLite connection: whether it holds the writer lock of this process."""
_POOL: Final[Mapping[str, Any]] = {"pool_size": 10, "max_overflow": 30, "pool_timeout": 10}
MAX_CONNECTIONS: Final = 40
"""Connections of one process at most: the two numbers above together."""


def create_engine_for(url: str) -> sa.Engine:
    """An engine for the URL, whose transactions begin and wait as their :data:`KIND_OPTION` says."""
    if sa.make_url(url).get_backend_name() == "sqlite":
        return _create_sqlite_engine(url)
    return _create_postgresql_engine(url)


# --- PostgreSQL ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Beginning:
    """How a kind of transaction begins on PostgreSQL."""

    isolation: str
    statement_seconds: float | None
    """How long the server works on a statement; null: for as long as it takes."""
    lock_seconds: float | None
    idle_seconds: float | None
    """How long the server waits for the next statement; null: for ever."""

    @property
    def statement(self) -> str:
        """One message to the server, so that it costs no more time than a bare BEGIN."""
        settings = {
            "statement_timeout": _milliseconds(self.statement_seconds),
            "lock_timeout": _milliseconds(self.lock_seconds),
            "idle_in_transaction_session_timeout": _milliseconds(self.idle_seconds),
            # The formats that the driver can read, whatever the role prefers.
            "DateStyle": "'ISO, MDY'",
            "TimeZone": "'UTC'",
            "extra_float_digits": "1",
            "standard_conforming_strings": "on",
        }
        local = "; ".join(f"SET LOCAL {name} = {value}" for name, value in settings.items())
        return f"BEGIN ISOLATION LEVEL {self.isolation}; {local}"

    @property
    def answer_seconds(self) -> float | None:
        """How long this side waits for the answer to a statement."""
        return None if self.statement_seconds is None else self.statement_seconds + _ANSWER_MARGIN_SECONDS


def _milliseconds(seconds: float | None) -> str:
    return str(round(1000 * (seconds or 0)))


# Not READ WRITE: where an administrator lets a database take no writes, a transaction must not decide otherwise.
_BEGINNINGS: Final[Mapping[TransactionKind, _Beginning]] = {
    "read": _Beginning("REPEATABLE READ READ ONLY", _STATEMENT_SECONDS, LOCK_SECONDS, _IDLE_SECONDS),
    "write": _Beginning("READ COMMITTED", _STATEMENT_SECONDS, LOCK_SECONDS, _IDLE_WRITER_SECONDS),
    "probe": _Beginning("READ COMMITTED", _PROBE_SECONDS, _PROBE_SECONDS, _IDLE_WRITER_SECONDS),
    "migration": _Beginning("READ COMMITTED", None, None, None),
}


class _TimedConnection(psycopg.Connection[Any]):
    """A connection that waits for an answer for a limited time, whatever has become of the server.

    A server that is frozen, or behind a network that drops packets, refuses nothing: its kernel, or nobody, goes on
    acknowledging. No time limit of the server's own counts then.
    """

    answer_seconds: float | None = _PING_SECONDS
    """How long it waits for the answer to a statement; null: for ever."""

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """As in psycopg, which comes here for every exchange with the server."""
        try:
            return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                # The answer may still come, and must not be taken for that to a later statement.
                self.close()
            raise


class _Connector:
    """Opens connections. After one that got no answer, others fail at once for a second.

    Otherwise all requests that wait for a turn would wait once more, one turn after the other.
    """

    def __init__(self) -> None:
        self._closed_until = 0.0

    def connect(self, _dialect: object, _record: object, arguments: Any, parameters: Any) -> _TimedConnection:
        """It has the shape of SQLAlchemy's event `do_connect`."""
        if time.monotonic() < self._closed_until:
            raise psycopg.OperationalError("the server did not answer a moment ago")
        try:
            return _TimedConnection.connect(*arguments, **parameters)
        except psycopg.errors.ConnectionTimeout:
            self._closed_until = time.monotonic() + _GATE_SECONDS
            raise


def _create_postgresql_engine(url: str) -> sa.Engine:
    defaults: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        # Whatever lies between may forget a silent connection.
        "keepalives_idle": 30,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
        "client_encoding": "utf8",
        "application_name": "pocl",
    }
    given = sa.make_url(url).query
    engine = sa.create_engine(
        url,
        **_POOL,
        connect_args={
            **{name: value for name, value in defaults.items() if name not in given},
            # The driver begins no transaction by itself, so the listener below decides.
            "autocommit": True,
            # A prepared statement belongs to a session of the server.
            "prepare_threshold": None,
        },
    )
    event.listen(engine, "do_connect", _Connector().connect)
    event.listen(engine, "begin", _begin_postgresql)
    event.listen(engine, "checkout", _verify_pooled_connection)
    event.listen(engine, "checkin", _note_return_to_pool)
    return engine


def _begin_postgresql(connection: sa.Connection) -> None:
    beginning = _BEGINNINGS[_kind_of(connection)]
    connection.exec_driver_sql(beginning.statement)
    driver_connection = connection.connection.driver_connection
    assert isinstance(driver_connection, _TimedConnection)
    driver_connection.answer_seconds = beginning.answer_seconds


def _verify_pooled_connection(_connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
    """Have the pool replace its connections where the server has ended this one, before a transaction begins on it.

    It has the shape of SQLAlchemy's event `checkout`. A server that ends a connection says so, which makes its socket
    readable; where nothing has been said, the server is asked only after a pause, in which whatever lies between may
    have forgotten the connection. So most transactions cost no exchange with the server for this.
    """
    connection = record.driver_connection
    assert isinstance(connection, _TimedConnection)
    returned_at = record.info.get(_RETURNED_AT)
    if returned_at is None:
        return  # It was opened a moment ago.
    if time.monotonic() - returned_at < _TRUSTED_SECONDS and not _has_unread_bytes(connection):
        return
    try:
        connection.execute("")
    except psycopg.Error as error:
        raise sa.exc.InvalidatePoolError from error


def _has_unread_bytes(connection: psycopg.Connection[Any]) -> bool:
    """Whether the server has said something unasked, or its end of the connection is closed."""
    poll = select.poll()
    try:
        poll.register(connection.fileno(), select.POLLIN)
    except psycopg.OperationalError:
        return True  # This end is closed already.
    return bool(poll.poll(0))


def _note_return_to_pool(_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
    """Note when a connection came back, and have it expect quick answers; the shape of the event `checkin`."""
    record.info[_RETURNED_AT] = time.monotonic()
    driver_connection = record.driver_connection
    if isinstance(driver_connection, _TimedConnection):
        driver_connection.answer_seconds = _PING_SECONDS


# --- SQLite -------------------------------------------------------------------------------------------


def _create_sqlite_engine(url: str) -> sa.Engine:
    # With isolation_level None the driver begins no transaction by itself, so the listeners below decide.
    engine = sa.create_engine(url, **_POOL, connect_args={"isolation_level": None, "timeout": _SQLITE_WRITE_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    file = Path(str(engine.url.database))

    def reserve(_connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        _reserve_log_space(file.with_name(f"{file.name}-wal"))

    event.listen(engine, "connect", reserve)
    lock = _SqliteWriterLock()
    event.listen(engine, "begin", lock.begin)
    event.listen(engine, "commit", lock.end)
    event.listen(engine, "rollback", lock.end)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_milliseconds(_SQLITE_WRITE_SECONDS)}")
    _use_write_ahead_log(cursor)
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _use_write_ahead_log(cursor: DBAPICursor) -> None:
    """Have a database file use a write-ahead log, as it does ever after.

    SQLite does not wait where another connection writes to a file that uses none yet, as when several processes open a
    new one at once: it says at once that the database is locked.
    """
    give_up_at = time.monotonic() + _SQLITE_WRITE_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(_WAL_RETRY_SECONDS)
        else:
            return


def _reserve_log_space(log: Path) -> None:
    """Keep disk space for the write-ahead log beyond its present end: on a full disk, states can still be written.

    Every commit goes to this file first; moving it on into the database may wait until there is space again. Where the
    file system cannot reserve space, or has none, nothing happens.
    """
    with suppress(OSError):
        # The locks of SQLite lie on other files: closing this one gives none away.
        descriptor = os.open(log, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _fallocate is not None and os.fstat(descriptor).st_blocks * 512 < _SQLITE_RESERVE_BYTES:
                _fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, 0, _SQLITE_RESERVE_BYTES)
        finally:
            os.close(descriptor)


def _find_fallocate() -> Any:  # Any: a function of the C library.
    function = getattr(ctypes.CDLL(None), "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
    return function


_fallocate: Final = _find_fallocate()


class _SqliteWriterLock:
    """Serializes the write transactions of this process, before they compete for SQLite's lock.

    SQLite lets writers poll for its lock with growing pauses, so that the one that has waited longest comes last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def begin(self, connection: sa.Connection) -> None:
        # A writer that begins deferred and upgrades its lock later fails at once where another one writes.
        kind = _kind_of(connection)
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if kind == 'read' else 'OFF'}")
        if kind == "read":
            connection.exec_driver_sql("BEGIN DEFERRED")
            return
        seconds = _SQLITE_LOCK_SECONDS.get(kind, _SQLITE_WRITE_SECONDS)
        deadline = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            raise DatabaseUnavailable(detail="another transaction of this process holds the lock of writers")
        connection.info[_HOLDS_WRITER_LOCK] = True
        try:
            left = max(deadline - time.monotonic(), 0.1)
            if abs(left - _SQLITE_WRITE_SECONDS) < 0.1:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                self._begin_within(connection, left)
        except BaseException:
            self.end(connection)
            raise

    def _begin_within(self, connection: sa.Connection, seconds: float) -> None:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_milliseconds(seconds)}")
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        finally:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {_milliseconds(_SQLITE_WRITE_SECONDS)}")

    def end(self, connection: sa.Connection) -> None:
        if connection.info.pop(_HOLDS_WRITER_LOCK, False):
            self._lock.release()


def _kind_of(connection: sa.Connection) -> TransactionKind:
    kind: TransactionKind = connection.get_execution_options().get(KIND_OPTION, "write")
    return kind
