"""The queue: whose turn it is, why a job waits, and until when. No function commits."""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from api.db import db_now
from api.jobs.models import Job
from api.jobs.states import HELD, JobStatus
from api.jobs.workers import Worker, live_workers

Reason = Literal["jobs_ahead", "waiting_for_worker", "no_worker", "no_worker_fits"]

_RECENT_JOBS: Final = 50
_MOST_FORESEEN: Final = 500
"""Jobs ahead beyond which nothing is said of the start."""


@dataclass(frozen=True)
class QueuePlace:
    """Where a queued job stands."""

    position: int
    """1: the next to be claimed."""
    ahead: int
    reason: Reason
    starts_at: datetime | None
    """Estimated; null where no worker fits, or too little is known."""


def at_work() -> sa.ScalarSelect[int]:
    """How many jobs of a job's project workers hold: of two projects that wait, the one with fewer is served first."""
    held = aliased(Job)
    count = sa.select(sa.func.count()).where(held.project == Job.project, held.status.in_(HELD))
    return count.correlate(Job).scalar_subquery()


def fits(memory: Mapping[str, int | None]) -> sa.ColumnElement[bool]:
    """Whether a job can run on devices of these kinds, with so much memory each; null: not known."""
    kinds = [("auto", memory.get(_chosen("auto", memory))), *memory.items()]
    return sa.or_(*(sa.and_(Job.device == kind, _within(most)) for kind, most in kinds))


def queue_place(session: Session, job: Job, *, worker_seconds: float) -> QueuePlace | None:
    """Where the job stands in the queue of all projects; null unless it is queued.

    Projects take turns: of each, the jobs come in the order of priority and age, and its n-th waits until it has
    as many at work as that.

    Args:
        worker_seconds: a worker that was not heard of for longer does not count.
    """
    if job.status is not JobStatus.QUEUED:
        return None
    ahead = _ahead(session, job)
    workers = live_workers(session, worker_seconds)
    able = [worker.name for worker in workers if _can_run(job, worker)]
    if not workers:
        return QueuePlace(ahead + 1, ahead, "no_worker", None)
    if not able:
        return QueuePlace(ahead + 1, ahead, "no_worker_fits", None)
    reason: Reason = "jobs_ahead" if ahead else "waiting_for_worker"
    return QueuePlace(ahead + 1, ahead, reason, _start(session, able, ahead))


def _ahead(session: Session, job: Job) -> int:
    order = (Job.priority.desc(), Job.created_at, Job.id)
    turn = sa.func.row_number().over(partition_by=Job.project, order_by=order) + at_work()
    waiting = (
        sa.select(Job.id, Job.priority, Job.created_at, turn.label("turn")).where(Job.status == JobStatus.QUEUED).cte()
    )
    mine = sa.select(waiting).where(waiting.c.id == job.id).subquery()
    earlier = sa.or_(
        waiting.c.priority > mine.c.priority,
        sa.and_(
            waiting.c.priority == mine.c.priority,
            sa.tuple_(waiting.c.turn, waiting.c.created_at, waiting.c.id)
            < sa.tuple_(mine.c.turn, mine.c.created_at, mine.c.id),
        ),
    )
    return session.scalar(sa.select(sa.func.count()).select_from(waiting, mine).where(earlier)) or 0


def _chosen(device: str, memory: Mapping[str, int | None]) -> str:
    """The kind of device that a job gets which asked for `device`."""
    if device != "auto":
        return device
    return "cuda" if "cuda" in memory else "cpu"


def _within(most: int | None) -> sa.ColumnElement[bool]:
    return sa.true() if most is None else sa.or_(Job.memory_bytes.is_(None), Job.memory_bytes <= most)


def memory_of(devices: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The least memory of each kind of device: on which of them a job comes is not known before."""
    found: dict[str, int | None] = {}
    for device in devices:
        kind, memory = str(device["kind"]), device["memory_bytes"]
        before = found.get(kind, memory)
        found[kind] = memory if before is None else before if memory is None else min(before, memory)
    return found


def _can_run(job: Job, worker: Worker) -> bool:
    memory = memory_of(worker.devices)
    kind = _chosen(job.device, memory)
    if kind not in memory:
        return False
    most = memory[kind]
    return most is None or job.memory_bytes is None or job.memory_bytes <= most


def _start(session: Session, workers: Collection[str], ahead: int) -> datetime | None:
    """When a worker comes free for a job with so many ahead, as if all were as long as those that ended of late."""
    if ahead > _MOST_FORESEEN:
        return None
    now = session.scalars(sa.select(db_now())).one()
    usual = _usual_length(session)
    held = session.scalars(sa.select(Job).where(Job.status.in_(HELD), Job.lease_owner.in_(workers))).all()
    free_at = [now] * (len(workers) - len({job.lease_owner for job in held}))
    for job in held:
        end = _end(job, now, usual)
        if end is None:
            return None
        free_at.append(end)
    heapq.heapify(free_at)
    for _ in range(ahead):
        if usual is None:
            return None
        heapq.heapreplace(free_at, free_at[0] + usual)
    return free_at[0]


def _end(job: Job, now: datetime, usual: timedelta | None) -> datetime | None:
    if job.eta_seconds is not None and job.progress_at is not None:
        return max(now, job.progress_at + timedelta(seconds=job.eta_seconds))
    if usual is None or job.started_at is None:
        return None
    return max(now, job.started_at + usual)


def _usual_length(session: Session) -> timedelta | None:
    """The mean over jobs that succeeded of late; null before the first."""
    ended = session.execute(
        sa.select(Job.started_at, Job.finished_at)
        .where(Job.status == JobStatus.SUCCEEDED)
        .order_by(Job.finished_at.desc())
        .limit(_RECENT_JOBS)
    )
    lengths = [finished - started for started, finished in ended if started is not None and finished is not None]
    return sum(lengths, timedelta()) / len(lengths) if lengths else None
