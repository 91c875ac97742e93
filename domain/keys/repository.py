"""Queries for API keys: make, verify, rotate, revoke. No function commits; expiry counts by the database's clock."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, db_now, fetch_page
from domain.errors import Conflict, NotFound, QuotaExceeded, Unprocessable
from domain.ids import new_id
from domain.keys.models import ApiKey, Scope
from domain.keys.tokens import KeyToken, make_token
from domain.projects.repository import lock_project
from pocl.errors import FieldError

MAX_KEYS: Final = 1000
"""The most keys of one project, those that are revoked or expired not counted."""
USE_SECONDS: Final = 60
"""How often the time of a key's last use is written at most."""
STALE_SECONDS: Final = 30 * 24 * 3600
"""How long a key that was revoked, or has expired, stays listed."""

KeyRefusal = Literal["unknown_key", "wrong_secret", "revoked_key", "expired_key"]


class KeyNotFound(NotFound):
    """The project has no key of this id."""

    code = "key_not_found"


class KeyNotActive(Conflict):
    """The key is revoked or has expired: make a new one."""

    code = "key_not_active"


class TooManyKeys(QuotaExceeded):
    """The project has 1000 keys: revoke those that are not needed."""

    code = "too_many_keys"
    retryable = False


@dataclass(frozen=True)
class VerifiedKey:
    """A key whose secret was presented."""

    key_id: str
    project: str
    scopes: tuple[Scope, ...]
    use_is_due: bool
    """Whether the time of its last use is to be written."""


def verify(session: Session, key_id: str, token_sha256: str) -> VerifiedKey | KeyRefusal:
    """Look up a key, and compare the digest of its text in constant time with the present one and, within the grace
    time of a rotation, with the previous one.

    Args:
        token_sha256: SHA-256, in hexadecimal, of the text that was presented.

    Returns:
        the key, or why it is not accepted.
    """
    found = session.execute(sa.select(ApiKey, db_now()).where(ApiKey.id == key_id)).one_or_none()
    if found is None:
        return "unknown_key"
    key, now = found
    is_present = hmac.compare_digest(token_sha256, key.token_sha256)
    is_previous = hmac.compare_digest(token_sha256, key.previous_sha256 or "")
    is_previous = is_previous and _is_before(now, key.previous_expires_at)
    if not (is_present or is_previous):
        return "wrong_secret"
    if key.revoked_at is not None:
        return "revoked_key"
    if key.expires_at is not None and not _is_before(now, key.expires_at):
        return "expired_key"
    use_is_due = key.last_used_at is None or (now - key.last_used_at).total_seconds() >= USE_SECONDS
    return VerifiedKey(key.id, key.project, tuple(key.scopes), use_is_due)


def record_use(session: Session, key_id: str) -> None:
    """Write that the key was used now, unless that was written in the last minute."""
    is_due = sa.or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= db_now(-USE_SECONDS))
    session.execute(sa.update(ApiKey).where(ApiKey.id == key_id, is_due).values(last_used_at=db_now()))


def create_key(
    session: Session, *, project: str, name: str, scopes: Sequence[Scope], expires_at: datetime | None = None
) -> tuple[ApiKey, KeyToken]:
    """Add a key.

    Returns:
        its row, and the only copy of its secret.

    Raises:
        ProjectNotFound: there is no such project.
        TooManyKeys: the project has as many as it may.
        Unprocessable: the key would have expired already.
    """
    lock_project(session, project)
    _refuse_past(session, expires_at)
    if count_active_keys(session, project) >= MAX_KEYS:
        raise TooManyKeys
    token = make_token(new_id("key"))
    key = ApiKey(
        id=token.key_id,
        project=project,
        name=name,
        scopes=list(scopes),
        token_sha256=token.sha256,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    session.refresh(key)
    return key, token


def get_key(session: Session, key_id: str, *, project: str | None) -> ApiKey:
    """A key.

    Args:
        project: whose key it must be; null: anybody's.

    Raises:
        KeyNotFound: the project has no such key.
    """
    return _one(session, _by_id(key_id, project))


def list_keys(session: Session, *, project: str | None, limit: int, after: str | None = None) -> KeysetPage[ApiKey]:
    """The keys of a project, or of all for null, newest first, after the one with the id `after`."""
    statement = sa.select(ApiKey).order_by(ApiKey.id.desc())
    if project is not None:
        statement = statement.where(ApiKey.project == project)
    return fetch_page(session, statement if after is None else statement.where(ApiKey.id < after), limit=limit)


def rename_key(session: Session, key_id: str, name: str, *, project: str | None) -> ApiKey:
    """Give a key another name; raises as :func:`get_key` does."""
    key = _one(session, _by_id(key_id, project).with_for_update())
    key.name = name
    session.flush()
    return key


def revoke_key(session: Session, key_id: str, *, project: str | None) -> ApiKey:
    """Have the key accepted no more; one that is revoked already stays as it is. Raises as :func:`get_key` does."""
    key = _one(session, _by_id(key_id, project).with_for_update())
    if key.revoked_at is None:
        key.revoked_at = session.scalars(sa.select(db_now())).one()
        session.flush()
    return key


def rotate_key(session: Session, key_id: str, *, grace_seconds: float, project: str | None) -> tuple[ApiKey, KeyToken]:
    """Give the key a new secret. The one that it had is accepted for `grace_seconds` more, the one before that no more.

    Returns:
        its row, and the only copy of its new secret.

    Raises:
        KeyNotFound: the project has no such key.
        KeyNotActive: it is revoked or has expired.
    """
    key = _one(session, _by_id(key_id, project).with_for_update())
    now, grace_ends = session.execute(sa.select(db_now(), db_now(grace_seconds))).one()
    if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise KeyNotActive
    token = make_token(key.id)
    key.previous_sha256, key.previous_expires_at = key.token_sha256, grace_ends
    key.token_sha256 = token.sha256
    session.flush()
    return key, token


def delete_key(session: Session, key_id: str, *, project: str | None) -> None:
    """Delete a key, which is accepted no more; raises as :func:`get_key` does."""
    session.delete(_one(session, _by_id(key_id, project).with_for_update()))
    session.flush()


def delete_keys(session: Session, project: str) -> None:
    """Delete all keys of a project."""
    session.execute(sa.delete(ApiKey).where(ApiKey.project == project))


def count_active_keys(session: Session, project: str) -> int:
    """The number of keys of a project that are neither revoked nor expired."""
    is_active = sa.and_(ApiKey.revoked_at.is_(None), sa.or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > db_now()))
    return session.scalar(sa.select(sa.func.count()).where(ApiKey.project == project, is_active)) or 0


def delete_stale_keys(session: Session) -> int:
    """Delete keys that were revoked, or have expired, long ago.

    Returns:
        how many were deleted.
    """
    ended = sa.or_(ApiKey.revoked_at < db_now(-STALE_SECONDS), ApiKey.expires_at < db_now(-STALE_SECONDS))
    return len(session.execute(sa.delete(ApiKey).where(ended).returning(ApiKey.id)).all())


def _refuse_past(session: Session, expires_at: datetime | None) -> None:
    if expires_at is not None and expires_at <= session.scalars(sa.select(db_now())).one():
        detail = "This time has passed: give a later one, or leave it out for a key that does not expire."
        raise Unprocessable(field_errors=[FieldError("/expires_at", "in_the_past", detail)])


def _is_before(now: datetime, end: datetime | None) -> bool:
    return end is not None and now < end


def _by_id(key_id: str, project: str | None) -> sa.Select[ApiKey]:
    statement = sa.select(ApiKey).where(ApiKey.id == key_id)
    return statement if project is None else statement.where(ApiKey.project == project)


def _one(session: Session, statement: sa.Select[ApiKey]) -> ApiKey:
    key = session.scalars(statement, execution_options={"populate_existing": True}).one_or_none()
    if key is None:
        raise KeyNotFound
    return key
