"""Registration of workers and schedulers: devices, liveness by heartbeats, and drain. No function commits."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, db_now, fetch_page, upsert_into
from domain.errors import NotFound
from domain.generations import GENERATION
from domain.workers.models import (
    Device,
    DrainMode,
    DutyLease,
    GpuFigures,
    SchedulerHeartbeat,
    WakeUp,
    Worker,
    WorkerHealth,
    WorkerState,
)

LEADER: Final = "leader"
"""The duty of the scheduler that leads: it does what only one of them is to do at a time."""
STALE_SECONDS: Final = 24 * 3600
"""Age of the last heartbeat beyond which a registration is deleted."""


class WorkerNotFound(NotFound):
    """There is no worker of this name."""

    code = "worker_not_found"


@cache
def own_version() -> str:
    """The version of this code."""
    return version("pocl-service")


def register_worker(
    session: Session, name: str, devices: Sequence[Device], *, gpu_figures: Sequence[GpuFigures] | None = None
) -> None:
    """Register a worker or renew its registration, which is its heartbeat; the mode of its drain stays.

    Args:
        gpu_figures: what the driver says of its GPUs now; null leaves what was said before.
    """
    changes: dict[str, Any] = {
        "devices": [asdict(device) for device in devices],
        "seen_at": db_now(),
        "version": own_version(),
        "generation": GENERATION,
    }
    if gpu_figures is not None:
        changes["gpu_figures"] = [figures.as_json() for figures in gpu_figures]
    statement = upsert_into(session.connection(), Worker).values(name=name, started_at=db_now(), **changes)
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_=changes))


def deregister_worker(session: Session, name: str) -> None:
    """Delete the registration of a worker that ends."""
    session.execute(sa.delete(Worker).where(Worker.name == name))


def delete_stale_workers(session: Session) -> int:
    """Delete registrations without a heartbeat for a day.

    Returns:
        how many were deleted.
    """
    stale = session.execute(sa.delete(Worker).where(Worker.seen_at < db_now(-STALE_SECONDS)).returning(Worker.name))
    return len(stale.all())


def drain(session: Session, name: str, mode: DrainMode | None) -> Worker:
    """Let the worker claim no more jobs; with null as the mode, let it claim jobs again, and check itself at once where
    it is quarantined.

    Raises:
        WorkerNotFound: no worker has this name.
    """
    worker = session.scalars(sa.select(Worker).where(Worker.name == name).with_for_update()).one_or_none()
    if worker is None:
        raise WorkerNotFound
    worker.drain = mode
    if mode is None and worker.quarantined_at is not None:
        worker.checks_at = session.scalars(sa.select(db_now())).one()
    session.flush()
    return worker


def worker_health(session: Session, name: str, *, max_wait_seconds: float) -> WorkerHealth:
    """Whether the worker may claim jobs; one that is not registered yet may.

    Args:
        max_wait_seconds: the longest wait for a check; one that is due later was set before the clock was put back.
    """
    due = sa.or_(Worker.checks_at <= db_now(), Worker.checks_at > db_now(max_wait_seconds + 1))
    row = session.execute(
        sa.select(Worker.drain, Worker.failures, Worker.quarantined_at, due.label("due")).where(Worker.name == name)
    ).one_or_none()
    if row is None:
        return WorkerHealth()
    quarantined = row.quarantined_at is not None
    return WorkerHealth(row.drain is not None, row.failures, quarantined, quarantined and bool(row.due))


def record_success(session: Session, name: str) -> None:
    """Forget the failures of a worker on which an attempt ended well."""
    session.execute(sa.update(Worker).where(Worker.name == name).values(failures=0))


def record_failure(session: Session, name: str) -> int:
    """Count one more attempt that ended on the worker by a fault of the system.

    Returns:
        how many there were in a row; 0 where the worker is not registered.
    """
    statement = sa.update(Worker).where(Worker.name == name).values(failures=Worker.failures + 1)
    return sum(session.scalars(statement.returning(Worker.failures)).all())


def quarantine(session: Session, name: str, reason: str, *, wait: Callable[[int], float]) -> None:
    """Let the worker claim nothing until a check of itself succeeds.

    Args:
        reason: what is wrong, in one sentence.
        wait: seconds until that check, after the n-th failure or failed check in a row.
    """
    worker = session.scalars(sa.select(Worker).where(Worker.name == name).with_for_update()).one()
    worker.failed_checks += 1
    worker.quarantine_reason = reason[:2000]
    times = max(worker.failed_checks, worker.failures - 1)
    now, due = session.execute(sa.select(db_now(), db_now(wait(times)))).one()
    worker.quarantined_at = worker.quarantined_at or now
    worker.checks_at = due
    session.flush()


def end_quarantine(session: Session, name: str) -> None:
    """Let a worker whose check of itself succeeded claim jobs again.

    Its failures stay counted until an attempt ends well, so that the next failure counts as one in a row.
    """
    session.execute(
        sa.update(Worker)
        .where(Worker.name == name)
        .values(quarantined_at=None, quarantine_reason=None, checks_at=None, failed_checks=0)
    )


def count_due_checks(session: Session) -> int:
    """The number of quarantined workers that are to check themselves now."""
    statement = sa.select(sa.func.count()).where(Worker.quarantined_at.is_not(None), Worker.checks_at <= db_now())
    return session.scalar(statement) or 0


def record_scheduler(
    session: Session, name: str, *, reaches_broker: bool, trackers: Sequence[str] = (), publishes: bool = False
) -> None:
    """Register a scheduler or renew its registration, which is its heartbeat.

    Args:
        trackers: the channels of trackers that it can forward metrics by.
        publishes: whether it has a token of the Hub to push students with.
    """
    values = {
        "reaches_broker": reaches_broker,
        "trackers": list(trackers),
        "publishes": publishes,
        "seen_at": db_now(),
        "version": own_version(),
        "generation": GENERATION,
    }
    statement = upsert_into(session.connection(), SchedulerHeartbeat).values(name=name, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))


def live_trackers(session: Session, within_seconds: float) -> set[str] | None:
    """The channels of trackers that a scheduler with a heartbeat in the last `within_seconds` has; null where there is
    no such scheduler.
    """
    recent = SchedulerHeartbeat.seen_at >= db_now(-within_seconds)
    listed = session.scalars(sa.select(SchedulerHeartbeat.trackers).where(recent)).all()
    return {channel for channels in listed for channel in channels} if listed else None


def live_publisher(session: Session, within_seconds: float) -> bool | None:
    """Whether a scheduler with a heartbeat in the last `within_seconds` pushes students to the Hub; null where there is
    no such scheduler.
    """
    recent = SchedulerHeartbeat.seen_at >= db_now(-within_seconds)
    listed = session.scalars(sa.select(SchedulerHeartbeat.publishes).where(recent)).all()
    return any(listed) if listed else None


def delete_stale_schedulers(session: Session) -> None:
    """Delete registrations of schedulers without a heartbeat for a day."""
    session.execute(sa.delete(SchedulerHeartbeat).where(SchedulerHeartbeat.seen_at < db_now(-STALE_SECONDS)))


def wake_up_state(session: Session, within_seconds: float) -> WakeUp:
    """Whether a scheduler with a heartbeat in the last `within_seconds` reaches the broker."""
    recent = SchedulerHeartbeat.seen_at >= db_now(-within_seconds)
    return wake_up_from(session.scalars(sa.select(SchedulerHeartbeat.reaches_broker).where(recent)).all())


def wake_up_from(reached: Sequence[bool]) -> WakeUp:
    """Whether workers are woken, by whether each live scheduler reaches the broker."""
    if not reached:
        return "no_scheduler"
    return "ok" if any(reached) else "broker_unreachable"


def worker_state(worker: Worker, *, holds_job: bool, lost_before: datetime) -> WorkerState:
    """The state of a worker.

    Args:
        lost_before: a worker whose last heartbeat is older is lost.
    """
    if worker.seen_at < lost_before:
        return "lost"
    if worker.quarantined_at is not None:
        return "quarantined"
    if worker.drain is not None:
        return "draining" if holds_job else "drained"
    return "busy" if holds_job else "idle"


def list_workers(session: Session, *, limit: int, after: str | None = None) -> KeysetPage[Worker]:
    """The workers by name, after the one with the name `after`."""
    statement = sa.select(Worker).order_by(Worker.name)
    return fetch_page(session, statement if after is None else statement.where(Worker.name > after), limit=limit)


def is_live(within_seconds: float) -> sa.ColumnElement[bool]:
    """Whether a worker had a heartbeat in the last `within_seconds` and is not drained; it may be quarantined."""
    return sa.and_(Worker.seen_at >= db_now(-within_seconds), Worker.drain.is_(None))


@dataclass(frozen=True)
class SchedulerState:
    """A scheduler, as its last heartbeat has it."""

    name: str
    leads: bool
    """Whether it holds the lease of the scheduler that leads."""
    reaches_broker: bool
    """Whether the broker answered at its last heartbeat."""
    seen_at: datetime
    """The time of its last heartbeat."""
    version: str | None
    generation: int | None


def get_leader(session: Session) -> str | None:
    """The name of the scheduler that leads; null where none does."""
    return session.scalar(
        sa.select(DutyLease.scheduler).where(DutyLease.duty == LEADER, DutyLease.expires_at > db_now())
    )


def list_schedulers(session: Session, *, limit: int, after: str | None = None) -> KeysetPage[SchedulerState]:
    """The schedulers with a heartbeat within a day by name, after the one with the name `after`."""
    leader = get_leader(session)
    statement = sa.select(SchedulerHeartbeat).order_by(SchedulerHeartbeat.name)
    if after is not None:
        statement = statement.where(SchedulerHeartbeat.name > after)
    page = fetch_page(session, statement, limit=limit)
    rows = [
        SchedulerState(row.name, row.name == leader, row.reaches_broker, row.seen_at, row.version, row.generation)
        for row in page.rows
    ]
    return KeysetPage(rows, page.has_more)


def another_reaches_broker(session: Session, scheduler: str, within_seconds: float) -> bool:
    """Whether another scheduler with a heartbeat in the last `within_seconds` reaches the broker."""
    others = sa.select(SchedulerHeartbeat.name).where(
        SchedulerHeartbeat.name != scheduler,
        SchedulerHeartbeat.reaches_broker,
        SchedulerHeartbeat.seen_at >= db_now(-within_seconds),
    )
    return session.scalars(others.limit(1)).first() is not None


def duty_holder(session: Session, duty: str) -> str | None:
    """The scheduler that took the lease of a duty last, whether it has expired or not; null before the first."""
    return session.scalar(sa.select(DutyLease.scheduler).where(DutyLease.duty == duty))


def release_duty(session: Session, duty: str, scheduler: str) -> None:
    """Let another scheduler take the lease of a duty at once, where this one holds it."""
    session.execute(
        sa.update(DutyLease)
        .where(DutyLease.duty == duty, DutyLease.scheduler == scheduler)
        .values(expires_at=db_now(-1))
    )


def take_duty(session: Session, duty: str, scheduler: str, *, seconds: float) -> bool:
    """Take or renew the lease of a duty; whether this scheduler holds it now.

    Args:
        seconds: how long it holds it unless it renews it.
    """
    values = {"scheduler": scheduler, "expires_at": db_now(seconds)}
    statement = upsert_into(session.connection(), DutyLease).values(duty=duty, **values)
    taken = session.execute(
        statement.on_conflict_do_update(
            index_elements=["duty"],
            set_=values,
            where=sa.or_(DutyLease.scheduler == scheduler, DutyLease.expires_at < db_now()),
        ).returning(DutyLease.duty)
    )
    return bool(taken.all())
