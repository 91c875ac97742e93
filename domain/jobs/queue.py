"""The queue: whose turn it is, why a job waits, and until when. No function commits."""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final, Literal, TypeVarTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now
from domain.jobs.models import Job
from domain.jobs.states import HELD, JobStatus
from domain.workers.repository import live_workers

Columns = TypeVarTuple("Columns")
QueueReason = Literal["jobs_ahead", "waiting_for_worker", "no_worker", "no_worker_fits"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE: Final = timedelta(minutes=1)
_RECENT_JOBS: Final = 50
_MOST_FORESEEN: Final = 500
"""Jobs ahead beyond which nothing is said of the start."""


@dataclass(frozen=True)
class QueuePosition:
    """Where a queued job stands."""

    position: int
    """1: the next to be claimed."""
    ahead: int
    reason: QueueReason
    starts_at: datetime | None
    """Estimated, in whole minutes; null where no worker fits, or too little is known."""


@dataclass(frozen=True)
class ResourceRequest:
    """What a job must have to run."""

    device: str
    memory_bytes: int | None
    """Null: not known."""


def order_by_fair_share(statement: sa.Select[*Columns]) -> tuple[sa.Select[*Columns], sa.ColumnElement[int]]:
    """A statement over jobs, and how many jobs of a job's project workers hold.

    Of two projects that wait, the one with fewer at work is served first.
    """
    # Counted once for each project. A count for each job that waits would read all jobs of its project, ended or not.
    held = (
        sa.select(Job.project, sa.func.count().label("jobs"))
        .where(Job.status.in_(HELD))
        .group_by(Job.project)
        .subquery("held")
    )
    return statement.outerjoin(held, held.c.project == Job.project), sa.func.coalesce(held.c.jobs, 0)


def runnable_on(memory: Mapping[str, int | None]) -> sa.ColumnElement[bool]:
    """Whether a job can run on devices of these kinds, with so much memory each; null: not known."""
    kinds = [("auto", memory.get(_chosen("auto", memory))), *memory.items()]
    return sa.or_(*(sa.and_(Job.device == kind, _within(most)) for kind, most in kinds))


def queue_position(session: Session, job: Job, *, worker_seconds: float) -> QueuePosition | None:
    """Where the job stands in the queue; null unless it is queued. As :func:`queue_positions`."""
    if job.status is not JobStatus.QUEUED:
        return None
    need = ResourceRequest(job.device, job.memory_bytes)
    return queue_positions(session, {job.id: need}, worker_seconds=worker_seconds).get(job.id)


def queue_positions(
    session: Session, waiting: Mapping[str, ResourceRequest], *, worker_seconds: float
) -> dict[str, QueuePosition]:
    """Where those of these jobs that are queued stand in the queue of all projects.

    Projects take turns: of each, the jobs come in the order of priority and age, and its n-th waits until it has
    as many at work as that.

    Args:
        waiting: what each needs, by id.
        worker_seconds: a worker that was not heard of for longer does not count.
    """
    if not waiting:
        return {}
    workers = [(worker.name, memory_by_device_kind(worker.devices)) for worker in live_workers(session, worker_seconds)]
    foresight = _StartEstimator(session)
    places = {}
    # One that was claimed since the caller read its row has no place any more.
    for job_id, ahead in _ahead(session, waiting).items():
        able = frozenset(name for name, memory in workers if _can_run(waiting[job_id], memory))
        reason: QueueReason = "jobs_ahead" if ahead else "waiting_for_worker"
        if not able:
            reason = "no_worker_fits" if workers else "no_worker"
        places[job_id] = QueuePosition(ahead + 1, ahead, reason, foresight.start(able, ahead))
    return places


def _ahead(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    order = (Job.priority.desc(), Job.created_at, Job.id)
    number = sa.func.row_number().over(partition_by=Job.project, order_by=order)
    statement, at_work = order_by_fair_share(
        sa.select(Job.id, Job.priority, Job.created_at).where(Job.status == JobStatus.QUEUED)
    )
    waiting = statement.add_columns((number + at_work).label("turn")).subquery()
    of = waiting.c
    place = sa.func.row_number().over(order_by=(of.priority.desc(), of.turn, of.created_at, of.id))
    places = sa.select(of.id, (place - 1).label("ahead")).subquery()
    found = session.execute(sa.select(places.c.id, places.c.ahead).where(places.c.id.in_(job_ids)))
    return {row.id: row.ahead for row in found}


def _chosen(device: str, memory: Mapping[str, int | None]) -> str:
    """The kind of device that a job gets which asked for `device`."""
    if device != "auto":
        return device
    return "cuda" if "cuda" in memory else "cpu"


def _within(most: int | None) -> sa.ColumnElement[bool]:
    return sa.true() if most is None else sa.or_(Job.memory_bytes.is_(None), Job.memory_bytes <= most)


def memory_by_device_kind(devices: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The least memory of each kind of device: on which of them a job comes is not known before."""
    found: dict[str, int | None] = {}
    for device in devices:
        kind, memory = str(device["kind"]), device["memory_bytes"]
        before = found.get(kind, memory)
        found[kind] = memory if before is None else before if memory is None else min(before, memory)
    return found


def _can_run(need: ResourceRequest, memory: Mapping[str, int | None]) -> bool:
    kind = _chosen(need.device, memory)
    if kind not in memory:
        return False
    most = memory[kind]
    return most is None or need.memory_bytes is None or need.memory_bytes <= most


class _StartEstimator:
    """When workers come free, as if all jobs were as long as those that ended of late."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._starts: dict[frozenset[str], list[datetime]] = {}

    def start(self, able: frozenset[str], ahead: int) -> datetime | None:
        """When one of these workers comes free for a job with so many ahead; null where too little is known.

        In whole minutes: an estimate that changes at every look would make every look news.
        """
        if not able or ahead > _MOST_FORESEEN:
            return None
        if able not in self._starts:
            self._starts[able] = self._foresee(able)
        starts = self._starts[able]
        return _up_to_the_minute(starts[ahead]) if ahead < len(starts) else None

    def _foresee(self, able: frozenset[str]) -> list[datetime]:
        """For 0, 1, ... jobs ahead."""
        held = [job for job in self._held if job.lease_owner in able]
        free_at = [self._now] * (len(able) - len({job.lease_owner for job in held}))
        for job in held:
            end = _end(job, self._now, self._usual)
            if end is None:
                return []
            free_at.append(end)
        heapq.heapify(free_at)
        starts = [free_at[0]]
        while self._usual is not None and len(starts) <= _MOST_FORESEEN:
            heapq.heapreplace(free_at, free_at[0] + self._usual)
            starts.append(free_at[0])
        return starts

    @cached_property
    def _now(self) -> datetime:
        return self._session.scalars(sa.select(db_now())).one()

    @cached_property
    def _usual(self) -> timedelta | None:
        return _usual_length(self._session)

    @cached_property
    def _held(self) -> Sequence[Job]:
        return self._session.scalars(sa.select(Job).where(Job.status.in_(HELD), Job.lease_owner.is_not(None))).all()


def _up_to_the_minute(moment: datetime) -> datetime:
    return moment + (_EPOCH - moment) % _MINUTE


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
