"""The workers: what each computes on, when it was last heard of, and whether it takes jobs. No function commits."""

from collections.abc import Sequence
from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, db_now, fetch_page, upsert_into
from domain.errors import NotFound
from domain.workers.models import Device, DrainMode, Worker

STALE_SECONDS = 24 * 3600


class WorkerNotFound(NotFound):
    """There is no worker of this name."""

    code = "worker_not_found"


def register_worker(session: Session, name: str, devices: Sequence[Device]) -> None:
    """Say that the worker lives; a drain that was asked for stays."""
    found = [asdict(device) for device in devices]
    statement = upsert_into(session.connection(), Worker).values(
        name=name, devices=found, started_at=db_now(), seen_at=db_now()
    )
    session.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_={"devices": found, "seen_at": db_now()})
    )


def deregister_worker(session: Session, name: str) -> None:
    """The worker has ended."""
    session.execute(sa.delete(Worker).where(Worker.name == name))


def delete_stale_workers(session: Session) -> int:
    """Drop rows of workers that were not heard of for a day; says how many."""
    lost = session.execute(sa.delete(Worker).where(Worker.seen_at < db_now(-STALE_SECONDS)).returning(Worker.name))
    return len(lost.all())


def drain(session: Session, name: str, how: DrainMode | None) -> Worker:
    """Let the worker take no more jobs, or jobs again.

    Raises:
        WorkerNotFound: no worker has this name.
    """
    worker = session.scalars(sa.select(Worker).where(Worker.name == name).with_for_update()).one_or_none()
    if worker is None:
        raise WorkerNotFound
    worker.drain = how
    session.flush()
    return worker


def accepts_jobs(session: Session, name: str) -> bool:
    """Whether the worker may claim; one that is not known yet may."""
    return session.scalars(sa.select(Worker.drain).where(Worker.name == name)).one_or_none() is None


def list_workers(session: Session, *, limit: int, after: str | None = None) -> KeysetPage[Worker]:
    """By name, after `after`."""
    statement = sa.select(Worker).order_by(Worker.name)
    return fetch_page(session, statement if after is None else statement.where(Worker.name > after), limit=limit)


def live_workers(session: Session, within_seconds: float) -> Sequence[Worker]:
    """Workers that were heard of of late and take jobs."""
    statement = sa.select(Worker).where(Worker.seen_at >= db_now(-within_seconds), Worker.drain.is_(None))
    return session.scalars(statement).all()
