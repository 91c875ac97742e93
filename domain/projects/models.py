"""The row of a project: the owner of jobs, data sets, checkpoints and keys, and its quotas."""

from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, UtcDateTime, db_now

DEFAULT_PROJECT: Final = "default"
"""The project that is there from the beginning. An admin key of it administers all projects."""
PROJECT_ID: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
"""A regular expression for the id of a project, which its maker chooses."""


class Project(Base):
    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    description: Mapped[str | None] = mapped_column(String(200))
    max_jobs_running: Mapped[int | None]
    """How many jobs of the project workers may hold at once; null: any number."""
    max_jobs_queued: Mapped[int | None]
    """How many jobs of the project may be queued at once; null: the setting of the service."""
    max_uploads: Mapped[int | None]
    """How many uploads of the project may be in progress at once; null: any number."""
    max_storage_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    """How much the data sets, checkpoints and artifacts of the project may hold; null: any amount."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
