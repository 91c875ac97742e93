"""Queries for browser sessions: begin, find, end. No function commits; expiry counts by the database's clock."""

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.browser_sessions.models import BrowserSession
from domain.db import db_now

SESSION_SECONDS: Final = 12 * 3600
"""How long a session lasts at most."""
MAX_SESSIONS: Final = 50
"""The most sessions of one key: one more ends the oldest."""
_MAX_DELETED: Final = 200
"""Expired sessions that the beginning of another one deletes, at most."""
_PAD: Final = b"pocl browser session: key digest\0"


@dataclass(frozen=True)
class FoundSession:
    """A session that has not expired."""

    key_id: str
    key_digest: bytes = field(repr=False)
    """The SHA-256 of the key that it was begun with, 32 bytes."""


def begin_session(session: Session, *, key_id: str, key_digest: bytes) -> str:
    """Add a session of a key, and delete sessions that have expired, and the oldest ones of a key that has too many.

    Args:
        key_digest: the SHA-256 of the key, 32 bytes.

    Returns:
        the token of the session, of which this is the only copy.
    """
    _delete_expired(session)
    _delete_oldest(session, key_id)
    token = secrets.token_urlsafe(32)
    session.add(
        BrowserSession(
            token_sha256=_digest(token),
            key_id=key_id,
            sealed_key=_pad(token, key_digest).hex(),
            expires_at=db_now(SESSION_SECONDS),
        )
    )
    session.flush()
    return token


def find_session(session: Session, token: str) -> FoundSession | None:
    """The session of a token; null where there is none, or it has expired."""
    statement = sa.select(BrowserSession.key_id, BrowserSession.sealed_key)
    row = session.execute(
        statement.where(BrowserSession.token_sha256 == _digest(token), BrowserSession.expires_at > db_now())
    ).one_or_none()
    return None if row is None else FoundSession(row.key_id, _pad(token, bytes.fromhex(row.sealed_key)))


def end_session(session: Session, token: str) -> None:
    """End the session of a token; one that has ended is no error."""
    session.execute(sa.delete(BrowserSession).where(BrowserSession.token_sha256 == _digest(token)))


def _delete_expired(session: Session) -> None:
    expired = sa.select(BrowserSession.token_sha256).where(BrowserSession.expires_at <= db_now()).limit(_MAX_DELETED)
    session.execute(sa.delete(BrowserSession).where(BrowserSession.token_sha256.in_(expired)))


def _delete_oldest(session: Session, key_id: str) -> None:
    newest = sa.select(BrowserSession.token_sha256).where(BrowserSession.key_id == key_id)
    too_many = newest.order_by(BrowserSession.expires_at.desc()).offset(MAX_SESSIONS - 1).limit(_MAX_DELETED)
    tokens = session.scalars(too_many).all()
    if tokens:
        session.execute(sa.delete(BrowserSession).where(BrowserSession.token_sha256.in_(tokens)))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _pad(token: str, digest: bytes) -> bytes:
    """A digest under the pad of a token; the same again takes the pad off. A token has a pad of its own."""
    pad = hashlib.sha256(_PAD + token.encode()).digest()
    return bytes(left ^ right for left, right in zip(pad, digest, strict=True))
