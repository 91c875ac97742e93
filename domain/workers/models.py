"""The table of workers."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

DrainMode = Literal["finish", "release"]


class Worker(Base):
    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    """The name of the worker's process: a worker that starts again has another."""
    devices: Mapped[list[dict[str, Any]]] = mapped_column(JsonType)
    drain: Mapped[DrainMode | None] = mapped_column(String(16))
    """Null: the worker accepts jobs. `finish`: it ends the job that it holds, and claims no other; `release`: it saves
    that job and releases it."""
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    """The time of its last heartbeat."""


@dataclass(frozen=True)
class Device:
    """A device on which a worker computes."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int | None
    """The memory of the device; null where it is not known."""
