"""What each error of a database means: one table for PostgreSQL's SQLSTATE codes, one for SQLite's result codes.

Everything that a database may do to a program which is itself right is a :class:`DatabaseUnavailable`: no process ends
over it, and a request is answered with "try again later". What is left is an error of this program (a wrong statement,
a value that does not fit its column), which passes unchanged.
"""

import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

from sqlalchemy import exc


class DatabaseFault(StrEnum):
    """What is wrong with the database."""

    CONFLICT = "conflict"
    """Another transaction was in the way; the same transaction may well succeed at once."""
    UNAVAILABLE = "unavailable"
    """It restarts, stays locked, cannot be reached, does not answer, or has no connection or memory left."""
    READ_ONLY = "read_only"
    """It takes no writes: a standby, or one whose administrator allows none."""
    REFUSED = "refused"
    """It does not accept the user, the password, or what the user may do."""
    SCHEMA = "schema"
    """It lacks tables or columns of this version."""
    FULL = "full"
    """It has no disk space left."""
    DAMAGED = "damaged"
    """Its files are damaged, or are no database."""


SENTENCES: Final[Mapping[DatabaseFault, str]] = {
    DatabaseFault.CONFLICT: "Another change to the same rows was in the way: try again.",
    DatabaseFault.UNAVAILABLE: "The database does not answer at present: try again later.",
    DatabaseFault.READ_ONLY: (
        "The database takes no writes at present (a standby, or one that is set to read only): try again later."
    ),
    DatabaseFault.REFUSED: "The database refuses the user of this service: its operator must look at that.",
    DatabaseFault.SCHEMA: (
        "The schema of the database is not that of this version: its operator must run `python -m api migrate`."
    ),
    DatabaseFault.FULL: "The database has no disk space left: free some and try again.",
    DatabaseFault.DAMAGED: "The database is damaged: its operator must restore it from a backup.",
}
"""One sentence for each fault, for clients too: none names a place or a value."""


class DatabaseUnavailable(Exception):
    """The transaction was not made, or nobody knows whether its commit was: the database is at fault."""

    def __init__(self, fault: DatabaseFault = DatabaseFault.UNAVAILABLE, detail: str = "") -> None:
        super().__init__(f"{SENTENCES[fault]} ({detail})" if detail else SENTENCES[fault])
        self.fault = fault
        self.detail = detail
        """What the driver said, for logs and for the operator: it may name hosts, users and files."""


# The codes of https://www.postgresql.org/docs/current/errcodes-appendix.html. A code is the database's fault unless its
# class is one of statements and their values: what nobody thought of is answered by "try again later", and ends nobody.
_POSTGRESQL_CODES: Final[Mapping[str, DatabaseFault]] = {
    # A plan of before a migration; a standby that is asked for a transaction that writes.
    "0A000": DatabaseFault.UNAVAILABLE,
    "0P000": DatabaseFault.REFUSED,
    "25006": DatabaseFault.READ_ONLY,
    # A prepared statement that is there already: something between has changed the server's session.
    "42P05": DatabaseFault.UNAVAILABLE,
    # Nobody knows whether the statement was completed.
    "40003": DatabaseFault.UNAVAILABLE,
    # The database of that name, or what this user may do.
    "3D000": DatabaseFault.REFUSED,
    "42501": DatabaseFault.REFUSED,
    "3F000": DatabaseFault.SCHEMA,
    "42P01": DatabaseFault.SCHEMA,
    "42703": DatabaseFault.SCHEMA,
    "53100": DatabaseFault.FULL,
    "58P01": DatabaseFault.DAMAGED,
    "XX001": DatabaseFault.DAMAGED,
    "XX002": DatabaseFault.DAMAGED,
}
_POSTGRESQL_CLASSES: Final[Mapping[str, DatabaseFault]] = {
    "28": DatabaseFault.REFUSED,  # user and password
    "40": DatabaseFault.CONFLICT,  # a transaction that was rolled back for another
    "72": DatabaseFault.CONFLICT,  # a snapshot that is too old
}
_PROGRAM_CODES: Final = frozenset({"25P02", "40002"})
"""A statement after one that failed in the same transaction; a constraint that is broken when it ends."""
_PROGRAM_CLASSES: Final = frozenset({"00", "01", "02", "03", "0Z", "21", "22", "23", "2F", "34", "42", "44", "54"})
"""Success and warnings; errors of a statement, of its values and of their size."""

# The codes of https://www.sqlite.org/rescode.html: the extended code where it is here, else the primary one, which is
# its low byte.
_SQLITE_CODES: Final[Mapping[int, DatabaseFault]] = {
    sqlite3.SQLITE_INTERNAL: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_PERM: DatabaseFault.REFUSED,
    # A rollback of the same transaction ended the statement.
    sqlite3.SQLITE_ABORT: DatabaseFault.CONFLICT,
    sqlite3.SQLITE_BUSY: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_BUSY_SNAPSHOT: DatabaseFault.CONFLICT,
    sqlite3.SQLITE_LOCKED: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_NOMEM: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_READONLY: DatabaseFault.READ_ONLY,
    sqlite3.SQLITE_INTERRUPT: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_IOERR: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_IOERR_CORRUPTFS: DatabaseFault.DAMAGED,
    # The index of the write-ahead log cannot grow; everything else reports a full disk as such.
    sqlite3.SQLITE_IOERR_SHMSIZE: DatabaseFault.FULL,
    sqlite3.SQLITE_CORRUPT: DatabaseFault.DAMAGED,
    sqlite3.SQLITE_NOTFOUND: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_FULL: DatabaseFault.FULL,
    sqlite3.SQLITE_CANTOPEN: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_PROTOCOL: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_SCHEMA: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_NOLFS: DatabaseFault.UNAVAILABLE,
    sqlite3.SQLITE_AUTH: DatabaseFault.REFUSED,
    sqlite3.SQLITE_FORMAT: DatabaseFault.DAMAGED,
    sqlite3.SQLITE_NOTADB: DatabaseFault.DAMAGED,
}
_WRONG_CALLS: Final = (exc.ProgrammingError, exc.DataError, exc.IntegrityError, exc.NotSupportedError)
_SQLITE_LACKS: Final = re.compile(r"no such (table|column)|table \w+ has no column")
"""How messages begin whose result code is that of any wrong statement."""


def classify(error: BaseException) -> DatabaseFault | None:
    """What is wrong with the database that raised this; null for any other error."""
    if isinstance(error, DatabaseUnavailable):
        return error.fault
    if isinstance(error, exc.TimeoutError | exc.PendingRollbackError):
        # No connection became free in time; the connection was lost earlier in this transaction.
        return DatabaseFault.UNAVAILABLE
    if not isinstance(error, exc.DBAPIError):
        return None
    return _classify_driver_error(error)


def _classify_driver_error(error: exc.DBAPIError) -> DatabaseFault | None:
    cause = error.orig
    code = getattr(cause, "sqlstate", None)
    if code is not None:
        return _classify_sqlstate(code)
    if isinstance(cause, sqlite3.Error):
        result = getattr(cause, "sqlite_errorcode", None)
        if result is not None:
            if result == sqlite3.SQLITE_ERROR:
                return DatabaseFault.SCHEMA if _SQLITE_LACKS.match(str(cause)) else None
            return _SQLITE_CODES.get(result, _SQLITE_CODES.get(result & 0xFF))
    # Without a code it is the driver that speaks: of a connection that is lost or closed, or of a wrong call.
    return None if isinstance(error, _WRONG_CALLS) and not error.connection_invalidated else DatabaseFault.UNAVAILABLE


def _classify_sqlstate(code: str) -> DatabaseFault | None:
    named = _POSTGRESQL_CODES.get(code)
    if named is not None:
        return named
    if code in _PROGRAM_CODES or code[:2] in _PROGRAM_CLASSES:
        return None
    return _POSTGRESQL_CLASSES.get(code[:2], DatabaseFault.UNAVAILABLE)


@contextmanager
def translating_database_errors(*, writes: bool = True) -> Iterator[None]:
    """Raise what the database is to blame for, inside the block, as :class:`DatabaseUnavailable`.

    Errors of a statement or of its values pass unchanged.

    Args:
        writes: whether the transaction may write; where not, a write is an error of the statement.
    """
    try:
        yield
    except exc.SQLAlchemyError as error:
        fault = classify(error)
        if fault is None or (fault is DatabaseFault.READ_ONLY and not writes):
            raise
        said = str(error.orig if isinstance(error, exc.DBAPIError) else error).strip()
        raise DatabaseUnavailable(fault, said.splitlines()[0] if said else type(error).__name__) from error
