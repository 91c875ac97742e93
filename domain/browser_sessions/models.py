"""The table of browser sessions."""

from datetime import datetime

from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, UtcDateTime, db_now


class BrowserSession(Base):
    """A browser that was logged in with a key. Neither its token nor the key can be read from the row."""

    __tablename__ = "browser_sessions"
    __table_args__ = (
        Index("ix_browser_sessions_key_id", "key_id", "expires_at"),
        Index("ix_browser_sessions_expires_at", "expires_at"),
    )

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256, in hexadecimal, of the token that the browser has, of 256 random bits."""
    key_id: Mapped[str] = mapped_column(String(64))
    """The key that it was logged in with; `static` for that of the settings, `local` for that of the first start, which
    have no row of their own."""
    sealed_key: Mapped[str] = mapped_column(String(64))
    """The digest of the key, in hexadecimal, under a one-time pad that follows from the token."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
