"""The table of workers."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, Self

import sqlalchemy as sa
from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

DrainMode = Literal["finish", "release"]
DeviceKind = Literal["cpu", "cuda"]
WorkerState = Literal["idle", "busy", "draining", "drained", "quarantined", "lost"]
WakeUp = Literal["ok", "no_scheduler", "broker_unreachable"]
"""Whether workers are woken for queued jobs; if not, why."""


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
    failures: Mapped[int] = mapped_column(default=0)
    """Attempts in a row that ended here by a fault of the system or its capacity."""
    quarantined_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Since when the worker claims nothing because a check of itself failed; null where it is well."""
    quarantine_reason: Mapped[str | None] = mapped_column(String(2000))
    """What the last check found, in one sentence."""
    checks_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the quarantined worker checks itself again."""
    failed_checks: Mapped[int] = mapped_column(default=0)
    """How often the worker was quarantined or a check of it failed since it was last well."""
    gpu_figures: Mapped[list[dict[str, Any]] | None] = mapped_column(JsonType)
    """What the driver said of its GPUs lately: see :class:`GpuFigures`; null where there is no driver."""
    version: Mapped[str | None] = mapped_column(String(64))
    """The version that it runs; null for one that records none."""
    generation: Mapped[int | None]
    """See :mod:`domain.generations`; null likewise."""


@dataclass(frozen=True)
class WorkerHealth:
    """Whether a worker may claim jobs, as its row has it."""

    drained: bool = False
    failures: int = 0
    """Attempts in a row that ended on the worker by a fault of the system or its capacity."""
    quarantined: bool = False
    check_is_due: bool = False
    """Whether a quarantined worker is to check itself again now."""


class SchedulerHeartbeat(Base):
    """A scheduler, and whether it reaches the broker, which the API does not know."""

    __tablename__ = "schedulers"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    """The name of the scheduler's process."""
    reaches_broker: Mapped[bool]
    """Whether the broker answered at the last heartbeat."""
    trackers: Mapped[list[str]] = mapped_column(JsonType, default=list, server_default="[]")
    """The channels of trackers that it can forward metrics by."""
    publishes: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Whether it has a token of the Hugging Face Hub to push students with."""
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    """The time of its last heartbeat."""
    version: Mapped[str | None] = mapped_column(String(64))
    """The version that it runs; null for one that records none."""
    generation: Mapped[int | None]
    """See :mod:`domain.generations`; null likewise."""


class DutyLease(Base):
    """Which scheduler does a duty that only one of them is to do at a time."""

    __tablename__ = "duty_leases"

    duty: Mapped[str] = mapped_column(String(64), primary_key=True)
    scheduler: Mapped[str] = mapped_column(String(200))
    """The name of the process that holds the lease."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


@dataclass(frozen=True)
class Device:
    """A device on which a worker computes."""

    kind: DeviceKind
    name: str
    memory_bytes: int | None
    """The memory of the device; null where it is not known."""
    uuid: str | None = None
    """The name of a GPU, or of a MIG instance of one, that its driver gives it for good; null for a CPU."""


@dataclass(frozen=True)
class GpuFigures:
    """What the driver says of a GPU at one moment; null for what it does not say."""

    uuid: str
    name: str
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    utilization: float | None = None
    """The share of the last moments in which the GPU computed, 0 to 1."""
    temperature_celsius: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The value for a JSON column."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Read what a worker stored, which may be of another version: fields that are not known are left out."""
        return cls(**{name: value for name, value in stored.items() if name in cls.__dataclass_fields__})
