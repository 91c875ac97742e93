"""Idempotency keys and the responses that are stored under them. No function commits.

The functions take the connection of a transaction: their statements are upserts and updates of one row, and none of
them goes through the identity map of a session.
"""

from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from domain.connections import LOCK_SECONDS
from domain.db import db_now, upsert_into
from domain.idempotency.models import IdempotencyKey

RESPONSE_TTL_SECONDS: Final = 24 * 3600
"""How long a stored response is replayed."""
_KEYS: Final = IdempotencyKey.metadata.tables[IdempotencyKey.__tablename__]
_LOCK_NOT_AVAILABLE: Final = "55P03"


@dataclass(frozen=True)
class StoredResponse:
    """An HTTP response that is stored under a key."""

    status: int
    media_type: str
    location: str | None
    body: bytes


@dataclass(frozen=True)
class StoredKey:
    """A key that another request holds or has settled."""

    fingerprint: str | None
    response: StoredResponse | None
    """The response of that request; null while it is in progress."""


@dataclass(frozen=True)
class KeyHolder:
    """A request that claims a key, told from others by a token of its own."""

    project: str
    key: str
    token: str


IN_PROGRESS: Final = StoredKey(None, None)


def find(connection: sa.Connection, holder: KeyHolder) -> StoredKey | None:
    """The key, where another request has it and it has not expired."""
    return _read(connection, holder, _KEYS.c.expires_at > db_now())


def claim(
    connection: sa.Connection,
    holder: KeyHolder,
    *,
    fingerprint: str | None,
    seconds: float,
    wait_seconds: float = LOCK_SECONDS,
) -> StoredKey | None:
    """Claim a free or expired key for `seconds`.

    Where another transaction is claiming the same key, this one waits for its end, for `wait_seconds` at most.

    Returns:
        null where the key is claimed, else the key of the other request. After a wait in vain that is
        :data:`IN_PROGRESS`, and the transaction can only be rolled back.
    """
    columns: dict[str, Any] = dict.fromkeys(("status", "media_type", "location", "body"))
    columns |= {"token": holder.token, "fingerprint": fingerprint}
    columns |= {"created_at": db_now(), "expires_at": db_now(seconds)}
    on_postgresql = connection.dialect.name == "postgresql"
    upsert = (
        upsert_into(connection, IdempotencyKey)
        .values(project=holder.project, key=holder.key, **columns)
        .on_conflict_do_update(index_elements=["project", "key"], set_=columns, where=_KEYS.c.expires_at <= db_now())
    )
    try:
        if on_postgresql:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(wait_seconds * 1000)}")
        claimed = connection.execute(upsert, execution_options={"preserve_rowcount": True}).rowcount
        if on_postgresql:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(LOCK_SECONDS * 1000)}")
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        return IN_PROGRESS
    # Where the key is gone by now, its request failed just now: the client may well try again.
    return None if claimed == 1 else _read(connection, holder) or IN_PROGRESS


def extend(connection: sa.Connection, holder: KeyHolder, *, seconds: float) -> bool:
    """Extend the hold on the key to `seconds` from now; false where the holder has lost it."""
    return bool(connection.execute(_where_held(sa.update(_KEYS), holder).values(expires_at=db_now(seconds))).rowcount)


def settle(
    connection: sa.Connection,
    holder: KeyHolder,
    *,
    fingerprint: str,
    response: StoredResponse,
    seconds: float = RESPONSE_TTL_SECONDS,
) -> bool:
    """Store the response of the holder's request for `seconds`; false where the holder has lost the key."""
    update = _where_held(sa.update(_KEYS), holder).values(
        fingerprint=fingerprint,
        status=response.status,
        media_type=response.media_type,
        location=response.location,
        body=response.body,
        expires_at=db_now(seconds),
    )
    return bool(connection.execute(update).rowcount)


def release(connection: sa.Connection, holder: KeyHolder) -> None:
    """Delete the key of a request that failed."""
    connection.execute(_where_held(sa.delete(_KEYS), holder))


def forget(connection: sa.Connection, holder: KeyHolder) -> None:
    """Delete the key of a request that was answered; one in progress stays."""
    connection.execute(_where_key(sa.delete(_KEYS), holder).where(_KEYS.c.status.is_not(None)))


def delete_expired(connection: sa.Connection) -> int:
    """Delete the keys that have expired; returns their number."""
    return connection.execute(sa.delete(_KEYS).where(_KEYS.c.expires_at <= db_now())).rowcount


def _where_held(statement: Any, holder: KeyHolder) -> Any:  # Any: of an update or a delete alike.
    return _where_key(statement, holder).where(_KEYS.c.token == holder.token, _KEYS.c.status.is_(None))


def _where_key(statement: Any, holder: KeyHolder) -> Any:  # Any: of a select, an update or a delete alike.
    return statement.where(_KEYS.c.project == holder.project, _KEYS.c.key == holder.key)


def _read(connection: sa.Connection, holder: KeyHolder, *conditions: sa.ColumnElement[bool]) -> StoredKey | None:
    row = connection.execute(_where_key(sa.select(_KEYS), holder).where(*conditions)).one_or_none()
    if row is None:
        return None
    if row.status is None:
        return StoredKey(row.fingerprint, None)
    return StoredKey(row.fingerprint, StoredResponse(row.status, row.media_type, row.location, bytes(row.body)))
