"""Registration of workers: devices, liveness by heartbeats, and drain. No function commits."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, db_now, fetch_page, upsert_into
from domain.errors import NotFound
from domain.workers.models import Device, DrainMode, Worker

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
    """Let the worker claim no more jobs; with null as the mode, let it claim jobs again.

    Raises:
        WorkerNotFound: no worker has this name.
    """
    worker = session.scalars(sa.select(Worker).where(Worker.name == name).with_for_update()).one_or_none()
    if worker is None:
        raise WorkerNotFound
    worker.drain = mode
    session.flush()
    return worker


def accepts_jobs(session: Session, name: str) -> bool:
    """Whether the worker may claim jobs; one that is not registered yet may."""
    return session.scalars(sa.select(Worker.drain).where(Worker.name == name)).one_or_none() is None


def list_workers(session: Session, *, limit: int, after: str | None = None) -> KeysetPage[Worker]:
    """The workers by name, after the one with the name `after`."""
    statement = sa.select(Worker).order_by(Worker.name)
    return fetch_page(session, statement if after is None else statement.where(Worker.name > after), limit=limit)


def live_workers(session: Session, within_seconds: float) -> Sequence[Worker]:
    """Workers with a heartbeat in the last `within_seconds` that accept jobs."""
    statement = sa.select(Worker).where(Worker.seen_at >= db_now(-within_seconds), Worker.drain.is_(None))
    return session.scalars(statement).all()
