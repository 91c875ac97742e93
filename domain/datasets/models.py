"""The row of an uploaded data set, whose samples are in the artifact store."""

from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

DatasetStatus = Literal["validating", "ready", "refused"]


class Dataset(Base):
    __tablename__ = "datasets"
    __table_args__ = (Index("ix_datasets_project", "project", "id"), Index("ix_datasets_status", "status"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), default="default")
    name: Mapped[str] = mapped_column(String(200))
    status: Mapped[DatasetStatus] = mapped_column(String(16), default="ready", server_default="ready")
    """`validating` while the file is still to be read; a job needs one that is `ready`."""
    refusal: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """Why a data set is `refused`: `code`, `message`, `retryable`, and `errors` with `pointer`, `code` and `detail`."""
    upload: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """How the file of one that is `validating` is to be read: `options` and `format_hint`."""
    validations: Mapped[int] = mapped_column(default=0, server_default="0")
    """How often its validation was begun, which is the fencing token of whoever validates it."""
    validated_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the lease of the process that validates it expires."""
    rows: Mapped[int]
    """The number of samples; 0 unless it is ready."""
    prompts: Mapped[int] = mapped_column(default=0, server_default="0")
    """How many of them have no answer: all or none."""
    ingestion: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    """How the uploaded file was read; null for data sets from before that was noted, which are stored as uploaded."""
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the stored file, in hexadecimal; empty unless it is ready."""
    store_key: Mapped[str] = mapped_column(String(255), unique=True)
    """The key of the JSONL file, relative to the artifact store."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
