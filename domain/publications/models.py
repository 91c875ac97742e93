"""The table of publications: what is pushed to which repository of the Hub, and what has come of it."""

from datetime import datetime, timedelta
from typing import Final, Literal

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

PublicationState = Literal["pending", "uploading", "published", "failed"]
"""`pending`: it waits for a scheduler, or for the next attempt; `uploading`: one is at it; `published`: the branch has
the files of the student; `failed`: nothing more is tried unless a client asks for it."""
UNDER_WAY: Final[tuple[PublicationState, ...]] = ("pending", "uploading")
"""The states in which the files of the checkpoint are still needed."""
LIFETIME: Final = timedelta(hours=24)
"""How long a publication is tried."""


class Publication(Base):
    """The push of one job's student. It is itself the lease of the scheduler that does it."""

    __tablename__ = "publications"
    __table_args__ = (Index("ix_publications_due", "state", "not_before"),)

    job_id: Mapped[str] = mapped_column(String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    repo: Mapped[str] = mapped_column(String(200))
    branch: Mapped[str] = mapped_column(String(128))
    private: Mapped[bool]
    """Whether the repository must not be public."""
    checkpoint_id: Mapped[str | None] = mapped_column(String(64))
    """The checkpoint that is pushed; null where the job has none of the kind. It may be deleted by now."""
    store_key: Mapped[str | None] = mapped_column(String(255))
    """The directory of its files, relative to the artifact store."""
    state: Mapped[PublicationState] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    """Attempts since the job succeeded, or since a client asked for another try: the wait grows by them."""
    not_before: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    """When the next attempt is due."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """After this no further attempt is made."""
    lease_token: Mapped[int] = mapped_column(default=0)
    """The fencing token of the newest attempt."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Until when the scheduler with that token alone pushes; null: none does."""
    error: Mapped[dict[str, str] | None] = mapped_column(JsonType)
    """`code` and `message` of the last failure; null where there was none since the first attempt."""
    url: Mapped[str | None] = mapped_column(String(1000))
    """Where people see the repository; null until it is published."""
    commit: Mapped[str | None] = mapped_column(String(64))
    """The commit of the branch that has the files."""
    published_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
