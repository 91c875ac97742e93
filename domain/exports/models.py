"""The table of exports: which checkpoint is written in which format of GGUF, and what has come of it."""

from datetime import datetime, timedelta
from typing import Final, Literal

import sqlalchemy as sa
from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now
from pocl.spec import GgufFormat

ExportState = Literal["pending", "running", "complete", "failed"]
"""`pending`: it waits for a worker, or for the next attempt; `running`: one is at it; `complete`: its files are whole
in the artifact store; `failed`: nothing more is tried unless a client asks for it."""
UNDER_WAY: Final[tuple[ExportState, ...]] = ("pending", "running")
"""The states in which the files of the checkpoint are still needed."""
LIFETIME: Final = timedelta(hours=24)
"""How long an export waits for a worker, its attempts included."""
MAX_ATTEMPTS: Final = 8
"""How many attempts there are at most, those that broke off with their worker included."""


class CheckpointExport(Base):
    """A checkpoint in one format of GGUF. It is itself the lease of the worker that makes it.

    Its files lie below the directory of the checkpoint in the artifact store, so that they go with it.
    """

    __tablename__ = "checkpoint_exports"
    __table_args__ = (
        sa.UniqueConstraint("checkpoint_id", "format", name="uq_checkpoint_exports_checkpoint_id_format"),
        Index("ix_checkpoint_exports_due", "state", "not_before"),
        Index("ix_checkpoint_exports_project", "project", "state"),
        Index("ix_checkpoint_exports_job", "job_id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(String(64))
    """The job that saved the checkpoint."""
    checkpoint_id: Mapped[str] = mapped_column(String(64), ForeignKey("checkpoints.id", ondelete="CASCADE"))
    format: Mapped[GgufFormat] = mapped_column(String(16))
    state: Mapped[ExportState] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    """Attempts since it was asked for, or since a client asked for another try: the wait grows by them."""
    not_before: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    """When the next attempt is due."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """After this no further attempt is made."""
    lease_token: Mapped[int] = mapped_column(default=0)
    """The fencing token of the newest attempt."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Until when the worker with that token alone makes it; null: none does."""
    error: Mapped[dict[str, str] | None] = mapped_column(JsonType)
    """`code`, `message` and `fault` of the last failure; null where there was none since the first attempt."""
    store_key: Mapped[str | None] = mapped_column(String(255), unique=True)
    """The directory of its files, relative to the artifact store; null until it is complete."""
    size_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    """The size of its files, the manifest included; null until it is complete."""
    manifest_sha256: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of its `manifest.json`, in hexadecimal; null until it is complete."""
    notes: Mapped[list[str] | None] = mapped_column(JsonType)
    """Sentences on what differs from the checkpoint; null until it is complete."""
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
