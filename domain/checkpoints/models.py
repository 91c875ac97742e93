"""The row of a checkpoint. It is written after the files are whole in the artifact store, and never changes."""

from datetime import datetime
from typing import get_args

import sqlalchemy as sa
from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, UtcDateTime, db_now
from pocl.events import CheckpointKind


class Checkpoint(Base):
    __tablename__ = "checkpoints"
    __table_args__ = (
        Index("ix_checkpoints_job", "job_id", "kind", "step"),
        Index("ix_checkpoints_project", "project", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), default="default")
    job_id: Mapped[str] = mapped_column(String(64), ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    """The number of the attempt that saved it, which is the attempt's fencing token."""
    kind: Mapped[CheckpointKind] = mapped_column(
        sa.Enum(
            *get_args(CheckpointKind),
            native_enum=False,
            create_constraint=True,
            length=16,
            name="checkpointkind",
        )
    )
    stage: Mapped[int | None]
    step: Mapped[int]
    """The optimiser steps that were done when it was saved."""
    store_key: Mapped[str] = mapped_column(String(255), unique=True)
    """The directory's key, relative to the artifact store."""
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    """SHA-256 of `manifest.json`, in hexadecimal."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
