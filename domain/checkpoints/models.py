"""The rows of checkpoints whose files are in the artifact store, and the tombstones of those that were deleted."""

from datetime import datetime
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, UtcDateTime, db_now
from pocl.events import CheckpointKind

DeletionReason = Literal["requested", "surplus", "expired", "job_deleted"]
"""Why a checkpoint was deleted: by a client; because a newer state or a better student took its place; by the retention
policy; or with its job."""


class Checkpoint(Base):
    """A checkpoint whose files are whole in the artifact store. Only whether it is pinned ever changes."""

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
    pinned: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Whether a client has pinned it: it is not deleted until it is unpinned."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class CheckpointTombstone(Base):
    """What remains of a deleted checkpoint, or of a deleted export of one.

    It takes the row's place in the transaction that deletes it, before any file is removed: what a process that is
    killed in between leaves is found here.
    """

    __tablename__ = "checkpoint_tombstones"
    __table_args__ = (Index("ix_checkpoint_tombstones_pending", "files_removed", "deleted_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The id that the checkpoint, or the export, had."""
    project: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(String(64))
    """The job that saved it, which may be deleted too."""
    store_key: Mapped[str] = mapped_column(String(255), unique=True)
    """The key of its directory in the artifact store, which no other checkpoint gets."""
    reason: Mapped[DeletionReason] = mapped_column(String(16))
    deleted_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    files_removed: Mapped[bool] = mapped_column(default=False)
    """Whether its files are known to be removed from the store."""
