"""The row of an `Idempotency-Key`."""

from datetime import datetime
from typing import Final

from sqlalchemy import CheckConstraint, Index, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, UtcDateTime, db_now

MAX_BODY_BYTES: Final = 256 * 1024
"""The largest response that is stored: eight times the largest that a job can have."""


class IdempotencyKey(Base):
    __tablename__ = "idempotency_keys"
    __table_args__ = (
        Index("ix_idempotency_keys_expires_at", "expires_at"),
        CheckConstraint(f"length(body) <= {MAX_BODY_BYTES}", name="body_bounded"),
    )

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    token: Mapped[str] = mapped_column(String(64))
    """The fencing token of the request that holds the key: one that lost it can neither settle nor release it."""
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the request, in hexadecimal; null while an upload arrives."""
    status: Mapped[int | None]
    """The HTTP status of the stored response; null while the request is in progress."""
    media_type: Mapped[str | None] = mapped_column(String(64))
    location: Mapped[str | None] = mapped_column(String(255))
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """When the key becomes free: a day after its response, or soon after the process of an upload has died."""
