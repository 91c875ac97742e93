"""The tables of usage. They refer to no job, so that what was used is known after the jobs are deleted."""

from datetime import date

import sqlalchemy as sa
from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base


class UsageRecord(Base):
    """The time that one ended attempt took of the devices of its worker on one day."""

    __tablename__ = "usage_records"
    __table_args__ = (Index("ix_usage_records_project", "project", "day"),)

    job_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    day: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    """The day in UTC."""
    project: Mapped[str] = mapped_column(String(64))
    worker: Mapped[str] = mapped_column(String(200))
    device: Mapped[str | None] = mapped_column(String(16))
    """`cpu` or `cuda`; null for attempts from before that was noted."""
    seconds: Mapped[float] = mapped_column(sa.Double)


class ChatDay(Base):
    """What the conversations of a project with its models took on one day."""

    __tablename__ = "chat_days"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    day: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    """The day in UTC on which they were answered."""
    requests: Mapped[int] = mapped_column(sa.BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(sa.BigInteger)
    completion_tokens: Mapped[int] = mapped_column(sa.BigInteger)


class StorageDay(Base):
    """The most that the files of a project were seen to take on one day."""

    __tablename__ = "storage_days"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    day: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    """The day in UTC."""
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
