"""The row of an API key. The secret itself is kept nowhere, only its digest."""

from datetime import datetime
from typing import Final, Literal

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

Scope = Literal["read", "submit", "admin"]
"""What a key may do: `read` what there is; `submit`, which also changes what the project has; `admin`, which also
administers its keys. Each includes the ones before it."""

SCOPES_INCLUDED: Final[dict[Scope, frozenset[Scope]]] = {
    "read": frozenset({"read"}),
    "submit": frozenset({"read", "submit"}),
    "admin": frozenset({"read", "submit", "admin"}),
}
"""The scopes that each includes, itself among them."""


class ApiKey(Base):
    __tablename__ = "api_keys"
    __table_args__ = (Index("ix_api_keys_project", "project", "id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    """What the key is for, in the words of its maker."""
    scopes: Mapped[list[Scope]] = mapped_column(JsonType)
    token_sha256: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the key's text, in hexadecimal. Its secret has 256 random bits, so that no slow hash is needed."""
    previous_sha256: Mapped[str | None] = mapped_column(String(64))
    """The same of the text before the last rotation; null before the first one."""
    previous_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Until when the secret before the last rotation is accepted."""
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """From when on no secret of the key is accepted; null: never."""
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the key was last used, to the minute."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
