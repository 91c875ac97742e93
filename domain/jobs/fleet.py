"""The workers that are alive, by what they can run. No function commits.

A poll of a queued job asks for them. Those of a large fleet are read once for many polls: see
:mod:`domain.reused_reads`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import JsonType, db_now, kept_by_database
from domain.reused_reads import ReusedRead
from domain.workers.models import SchedulerHeartbeat, WakeUp, Worker
from domain.workers.repository import is_live, wake_up_from

LARGE_FLEET: Final = 100
"""Fewer workers are read anew each time."""


@dataclass(frozen=True)
class ResourceRequest:
    """The resources that a job needs to run."""

    device: str
    memory_bytes: int | None
    """Device memory; null where it is not known."""
    not_before: datetime | None = None
    """When the job may be claimed; null: at once."""


@dataclass(frozen=True)
class FleetWorker:
    """A live worker that is not drained."""

    name: str
    devices: Sequence[Mapping[str, Any]]
    """The values of :class:`domain.workers.models.Device`."""
    is_quarantined: bool
    """Whether it claims nothing until a check of itself succeeds."""

    @cached_property
    def memory(self) -> dict[str, int | None]:
        """See :func:`memory_by_device_kind`."""
        return memory_by_device_kind(self.devices)


class Fleet:
    """The live workers that are not drained, at one moment.

    Args:
        woken: whether workers are woken for queued jobs; if not, why.
    """

    def __init__(self, workers: Sequence[FleetWorker], woken: WakeUp) -> None:
        self.woken = woken
        self.workers = workers
        self._alike: dict[tuple[bool, frozenset[tuple[str, int | None]]], list[FleetWorker]] = {}
        for worker in workers:
            self._alike.setdefault((worker.is_quarantined, frozenset(worker.memory.items())), []).append(worker)

    @property
    def accepting(self) -> int:
        """How many of them claim jobs."""
        return sum(not worker.is_quarantined for worker in self.workers)

    def able(self, request: ResourceRequest, *, quarantined: bool = False) -> list[FleetWorker]:
        """The workers that can run a job: those that claim jobs, or those that are quarantined."""
        return [
            worker
            for (is_quarantined, memory), alike in self._alike.items()
            if is_quarantined is quarantined and can_run(request, dict(memory))
            for worker in alike
        ]


class FleetReader:
    """Reads the fleet of a database."""

    def __init__(self) -> None:
        self._read: ReusedRead[Fleet] = ReusedRead(lambda fleet: len(fleet.workers) >= LARGE_FLEET)

    def get(self, session: Session, worker_seconds: float) -> Fleet:
        """See :func:`live_fleet`."""
        return self._read.get(lambda: _read_fleet(session, worker_seconds), worker_seconds)


def live_fleet(session: Session, worker_seconds: float) -> Fleet:
    """The workers that are alive and not drained; those of a large fleet as they were a moment ago.

    Args:
        worker_seconds: a worker whose last heartbeat is older does not count.
    """
    return kept_by_database(session, FleetReader).get(session, worker_seconds)


def device_kind_for(device: str, memory: Mapping[str, int | None]) -> str:
    """The kind of device that a job gets on a worker with these, where it asks for `device`."""
    if device != "auto":
        return device
    return "cuda" if "cuda" in memory else "cpu"


def memory_by_device_kind(devices: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The least memory of each kind of device, in bytes: on which device of a kind a job will run is not known."""
    least: dict[str, int | None] = {}
    for device in devices:
        kind, memory = str(device["kind"]), device["memory_bytes"]
        smallest = least.get(kind, memory)
        least[kind] = memory if smallest is None else smallest if memory is None else min(smallest, memory)
    return least


def can_run(request: ResourceRequest, memory: Mapping[str, int | None]) -> bool:
    """Whether a job can run on devices of these kinds, with so many bytes of memory each; null: not known."""
    kind = device_kind_for(request.device, memory)
    if kind not in memory:
        return False
    limit = memory[kind]
    return limit is None or request.memory_bytes is None or request.memory_bytes <= limit


def _read_fleet(session: Session, worker_seconds: float) -> Fleet:
    workers, reached = [], []
    for row in session.execute(_live_statement(worker_seconds)):
        if row.devices is None:
            reached.append(row.flag)
        else:
            workers.append(FleetWorker(row.name, row.devices, is_quarantined=row.flag))
    return Fleet(workers, wake_up_from(reached))


# A statement that is made once costs a tenth of one that is made anew, and one statement half of two.
@lru_cache(maxsize=8)
def _live_statement(within_seconds: float) -> sa.CompoundSelect[str, list[dict[str, Any]] | None, bool]:
    """The live workers, `flag` telling whether they are quarantined; and the live schedulers, which have no `devices`,
    `flag` telling whether they reach the broker.
    """
    is_quarantined = Worker.quarantined_at.is_not(None).label("flag")
    workers = sa.select(Worker.name, Worker.devices, is_quarantined).where(is_live(within_seconds))
    no_devices = sa.cast(sa.null(), JsonType).label("devices")
    recent = SchedulerHeartbeat.seen_at >= db_now(-within_seconds)
    reached = SchedulerHeartbeat.reaches_broker.label("flag")
    return workers.union_all(sa.select(SchedulerHeartbeat.name, no_devices, reached).where(recent))
