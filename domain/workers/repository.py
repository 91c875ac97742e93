"""Registration of workers and schedulers: devices, liveness by heartbeats, and drain. No function commits."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, db_now, fetch_page, upsert_into
from domain.errors import NotFound
from domain.workers.models import Device, DrainMode, SchedulerHeartbeat, WakeUp, Worker, WorkerHealth

STALE_SECONDS: Final = 24 * 3600
"""Age of the last heartbeat beyond which a registration is deleted."""


class WorkerNotFound(NotFound):
    """There is no worker of this name."""

    code = "worker_not_found"


def register_worker(session: Session, name: str, devices: Sequence[Device]) -> None:
    """Register a worker or renew its registration, which is its heartbeat; the mode of its drain stays."""
    values = [asdict(device) for device in devices]
    statement = upsert_into(session.connection(), Worker).values(
        name=name, devices=values, started_at=db_now(), seen_at=db_now()
    )
    session.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_={"devices": values, "seen_at": db_now()})
    )


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


def record_scheduler(session: Session, name: str, *, reaches_broker: bool) -> None:
    """Register a scheduler or renew its registration, which is its heartbeat."""
    statement = upsert_into(session.connection(), SchedulerHeartbeat).values(
        name=name, reaches_broker=reaches_broker, seen_at=db_now()
    )
    changes = {"reaches_broker": reaches_broker, "seen_at": db_now()}
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_=changes))


def delete_stale_schedulers(session: Session) -> None:
    """Delete registrations of schedulers without a heartbeat for a day."""
    session.execute(sa.delete(SchedulerHeartbeat).where(SchedulerHeartbeat.seen_at < db_now(-STALE_SECONDS)))


def wake_up_state(session: Session, within_seconds: float) -> WakeUp:
    """Whether a scheduler with a heartbeat in the last `within_seconds` reaches the broker."""
    live = sa.select(SchedulerHeartbeat.reaches_broker).where(SchedulerHeartbeat.seen_at >= db_now(-within_seconds))
    reached = session.scalars(live).all()
    if not reached:
        return "no_scheduler"
    return "ok" if any(reached) else "broker_unreachable"


def list_workers(session: Session, *, limit: int, after: str | None = None) -> KeysetPage[Worker]:
    """The workers by name, after the one with the name `after`."""
    statement = sa.select(Worker).order_by(Worker.name)
    return fetch_page(session, statement if after is None else statement.where(Worker.name > after), limit=limit)


def live_workers(session: Session, within_seconds: float) -> Sequence[Worker]:
    """Workers with a heartbeat in the last `within_seconds` that are not drained; some may be quarantined."""
    statement = sa.select(Worker).where(Worker.seen_at >= db_now(-within_seconds), Worker.drain.is_(None))
    return session.scalars(statement).all()
