"""Keys and the answers that were given under them. No function commits.

They take a connection, so that a key can be claimed in the very moment in which a session's transaction begins.
"""

from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from domain.db import db_now, upsert_into
from domain.idempotency.models import IdempotencyKey

RESPONSE_TTL_SECONDS: Final = 24 * 3600
"""How long an answer is shown again."""
LOCK_TIMEOUT_SECONDS: Final = 10.0
"""How long a duplicate waits for the first request's transaction; SQLite waits for any writer, and longer."""

_KEYS: Final = IdempotencyKey.metadata.tables[IdempotencyKey.__tablename__]
_LOCK_NOT_AVAILABLE: Final = "55P03"


@dataclass(frozen=True)
class StoredResponse:
    """What is shown again."""

    status: int
    media_type: str
    location: str | None
    body: bytes


@dataclass(frozen=True)
class StoredKey:
    """What stands under a key of somebody else."""

    fingerprint: str | None
    response: StoredResponse | None
    """Null: the request is under way."""


@dataclass(frozen=True)
class KeyHolder:
    """A request, and the key that it came with."""

    project: str
    key: str
    token: str


IN_PROGRESS: Final = StoredKey(None, None)


def find(connection: sa.Connection, holder: KeyHolder) -> StoredKey | None:
    """What stands under the key and has not expired."""
    return _read(connection, holder, _KEYS.c.expires_at > db_now())


def claim(
    connection: sa.Connection,
    holder: KeyHolder,
    *,
    fingerprint: str | None,
    seconds: float,
    wait_seconds: float = LOCK_TIMEOUT_SECONDS,
) -> StoredKey | None:
    """Take a key that is free, for `seconds`; None if that succeeded, else what stands in the way.

    Where another transaction is taking the same key, this one waits for its end. A transaction that waited in
    vain is told :data:`IN_PROGRESS` and can only be rolled back.
    """
    fresh: dict[str, Any] = dict.fromkeys(("status", "media_type", "location", "body"))
    fresh |= {"token": holder.token, "fingerprint": fingerprint}
    fresh |= {"created_at": db_now(), "expires_at": db_now(seconds)}
    on_postgresql = connection.dialect.name == "postgresql"
    taken = (
        upsert_into(connection, IdempotencyKey)
        .values(project=holder.project, key=holder.key, **fresh)
        .on_conflict_do_update(index_elements=["project", "key"], set_=fresh, where=_KEYS.c.expires_at <= db_now())
    )
    try:
        if on_postgresql:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(wait_seconds * 1000)}")
        made = connection.execute(taken, execution_options={"preserve_rowcount": True}).rowcount
        if on_postgresql:
            connection.exec_driver_sql("SET LOCAL lock_timeout TO DEFAULT")
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        return IN_PROGRESS
    # Gone in between: its request failed just now, and the client may well try again.
    return None if made == 1 else _read(connection, holder) or IN_PROGRESS


def extend(connection: sa.Connection, holder: KeyHolder, *, seconds: float) -> bool:
    """Hold the key for `seconds` from now; whether it still belongs to the holder."""
    return bool(connection.execute(_own(sa.update(_KEYS), holder).values(expires_at=db_now(seconds))).rowcount)


def settle(connection: sa.Connection, holder: KeyHolder, *, fingerprint: str, response: StoredResponse) -> bool:
    """Keep the answer; whether the key still belonged to the holder."""
    kept = _own(sa.update(_KEYS), holder).values(
        fingerprint=fingerprint,
        status=response.status,
        media_type=response.media_type,
        location=response.location,
        body=response.body,
        expires_at=db_now(RESPONSE_TTL_SECONDS),
    )
    return bool(connection.execute(kept).rowcount)


def release(connection: sa.Connection, holder: KeyHolder) -> None:
    """Free the key of a request that failed."""
    connection.execute(_own(sa.delete(_KEYS), holder))


def delete_expired(connection: sa.Connection) -> int:
    """Remove what no longer counts; says how many."""
    return connection.execute(sa.delete(_KEYS).where(_KEYS.c.expires_at <= db_now())).rowcount


def _own(statement: Any, holder: KeyHolder) -> Any:  # Any: of an update or a delete alike.
    return _of(statement, holder).where(_KEYS.c.token == holder.token, _KEYS.c.status.is_(None))


def _of(statement: Any, holder: KeyHolder) -> Any:  # Any: of a select, an update or a delete alike.
    return statement.where(_KEYS.c.project == holder.project, _KEYS.c.key == holder.key)


def _read(connection: sa.Connection, holder: KeyHolder, *conditions: sa.ColumnElement[bool]) -> StoredKey | None:
    row = connection.execute(_of(sa.select(_KEYS), holder).where(*conditions)).one_or_none()
    if row is None:
        return None
    if row.status is None:
        return StoredKey(row.fingerprint, None)
    return StoredKey(row.fingerprint, StoredResponse(row.status, row.media_type, row.location, bytes(row.body)))
