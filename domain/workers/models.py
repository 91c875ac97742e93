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
    """Unique while it lives; a worker that starts again has another."""
    devices: Mapped[list[dict[str, Any]]] = mapped_column(JsonType)
    drain: Mapped[DrainMode | None] = mapped_column(String(16))
    """Null: it takes jobs. `finish`: it ends the one that it has; `release`: it saves that and gives it back."""
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


@dataclass(frozen=True)
class Device:
    """One thing that a worker computes on."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int | None
    """Null where it could not be found out."""
