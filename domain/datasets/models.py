"""The row of an uploaded data set, whose samples are in the artifact store."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now


class Dataset(Base):
    __tablename__ = "datasets"
    __table_args__ = (Index("ix_datasets_project", "project", "id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), default="default")
    name: Mapped[str] = mapped_column(String(200))
    rows: Mapped[int]
    """The number of samples."""
    prompts: Mapped[int] = mapped_column(default=0, server_default="0")
    """How many of them have no answer: all or none."""
    ingestion: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """How the uploaded file was read; null for data sets from before that was noted, which are stored as uploaded."""
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the stored file, in hexadecimal."""
    store_key: Mapped[str] = mapped_column(String(255), unique=True)
    """The key of the JSONL file, relative to the artifact store."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
