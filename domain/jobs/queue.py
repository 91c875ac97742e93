"""The queue: fair share among projects, why a job waits, and its estimated start. No function commits."""

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
from domain.jobs.retries import OtherWorker
from domain.jobs.states import HELD, JobStatus
from domain.workers.repository import live_workers, wake_up_state

Columns = TypeVarTuple("Columns")
QueueReason = Literal[
    "jobs_ahead",
    "waiting_for_worker",
    "no_worker",
    "no_worker_fits",
    "workers_quarantined",
    "backing_off",
    "broker_unreachable",
]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE: Final = timedelta(minutes=1)
_RECENT_JOBS: Final = 50
_MAX_ESTIMATED_AHEAD: Final = 500
"""With more jobs ahead than these no start is estimated."""


@dataclass(frozen=True)
class QueuePosition:
    """The position of a queued job."""

    position: int
    """The position in the queue of all projects, counted from 1: the next job to be claimed."""
    ahead: int
    """How many jobs will be claimed before it."""
    reason: QueueReason
    starts_at: datetime | None
    """The estimated start, in whole minutes; null where no worker fits, or too little is known."""
    until: datetime | None = None
    """When a job that is backing off may be claimed; null for any other reason."""


@dataclass(frozen=True)
class ResourceRequest:
    """The resources that a job needs to run."""

    device: str
    memory_bytes: int | None
    """Device memory; null where it is not known."""
    not_before: datetime | None = None
    """When the job may be claimed; null: at once."""


def order_by_fair_share(statement: sa.Select[*Columns]) -> tuple[sa.Select[*Columns], sa.ColumnElement[int]]:
    """The statement over jobs, joined with how many jobs of the same project are held by workers; and that number.

    Ordering by it gives projects their fair share: of two that wait, the one with fewer held jobs comes first.
    """
    # Counted once for each project: to count for each waiting job would read all jobs of its project, ended ones too.
    held = (
        sa.select(Job.project, sa.func.count().label("jobs"))
        .where(Job.status.in_(HELD))
        .group_by(Job.project)
        .subquery("held")
    )
    return statement.outerjoin(held, held.c.project == Job.project), sa.func.coalesce(held.c.jobs, 0)


def runnable_on(memory: Mapping[str, int | None]) -> sa.ColumnElement[bool]:
    """Whether a job can run on devices of these kinds, with so many bytes of memory each; null: not known.

    A worker without a device runs none.
    """
    if not memory:
        return sa.false()
    kinds = [("auto", memory.get(_device_kind_for("auto", memory))), *memory.items()]
    return sa.or_(*(sa.and_(Job.device == kind, _fits_memory(limit)) for kind, limit in kinds))


def queue_position(session: Session, job: Job, *, worker_seconds: float) -> QueuePosition | None:
    """The position of the job in the queue; null unless it is queued. See :func:`queue_positions`."""
    if job.status is not JobStatus.QUEUED:
        return None
    requests = {job.id: ResourceRequest(job.device, job.memory_bytes, job.not_before)}
    return queue_positions(session, requests, worker_seconds=worker_seconds).get(job.id)


def queue_positions(
    session: Session, requests: Mapping[str, ResourceRequest], *, worker_seconds: float
) -> dict[str, QueuePosition]:
    """The positions of those of these jobs that are queued, in the queue of all projects.

    Projects share the workers fairly: the jobs of a project come in the order of priority and age, and the n-th waiting
    one counts as if the n - 1 before it were held by workers already.

    Args:
        requests: the resources that each job needs, by the job's id.
        worker_seconds: a worker whose last heartbeat is older does not count.

    Returns:
        the position by the job's id.
    """
    if not requests:
        return {}
    workers: list[tuple[str, dict[str, int | None]]] = []
    quarantined: list[tuple[str, dict[str, int | None]]] = []
    for worker in live_workers(session, worker_seconds):
        known = (worker.name, memory_by_device_kind(worker.devices))
        (workers if worker.quarantined_at is None else quarantined).append(known)
    now = session.scalars(sa.select(db_now())).one()
    woken = wake_up_state(session, worker_seconds) != "broker_unreachable"
    estimator = _StartEstimator(session, now)
    positions = {}
    # A job that was claimed since the caller read its row has no position any more.
    for job_id, ahead in _count_ahead(session, requests).items():
        request = requests[job_id]
        able = frozenset(name for name, memory in workers if _can_run(request, memory))
        reason: QueueReason = "jobs_ahead" if ahead else "waiting_for_worker"
        until = None
        if request.not_before is not None and request.not_before > now:
            reason, until = "backing_off", request.not_before
        elif not able and any(_can_run(request, memory) for _, memory in quarantined):
            reason = "workers_quarantined"
        elif not able:
            reason = "no_worker_fits" if workers or quarantined else "no_worker"
        elif not woken:
            reason = "broker_unreachable"
        starts_at = estimator.estimate(able, ahead)
        if starts_at is not None and until is not None:
            starts_at = max(starts_at, _round_up_to_minute(until))
        positions[job_id] = QueuePosition(ahead + 1, ahead, reason, starts_at, until)
    return positions


def other_workers(session: Session, worker: str, *, within_seconds: float) -> list[OtherWorker]:
    """The live workers besides this one that accept jobs."""

    def as_other(name: str, memory: Mapping[str, int | None]) -> OtherWorker:
        return OtherWorker(name, lambda job: _can_run(ResourceRequest(job.device, job.memory_bytes), memory))

    return [
        as_other(each.name, memory_by_device_kind(each.devices))
        for each in live_workers(session, within_seconds)
        if each.name != worker and each.quarantined_at is None
    ]


def _count_ahead(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    """How many jobs will be claimed before each of these, by the job's id."""
    backs_off = sa.case((Job.not_before > db_now(), 1), else_=0)
    order = (backs_off, Job.priority.desc(), Job.created_at, Job.id)
    number_in_project = sa.func.row_number().over(partition_by=Job.project, order_by=order)
    statement, held_jobs = order_by_fair_share(
        sa.select(Job.id, Job.priority, Job.created_at).where(Job.status == JobStatus.QUEUED)
    )
    queued = (
        statement.add_columns((number_in_project + held_jobs).label("share"), backs_off.label("backs_off")).subquery().c
    )
    position = sa.func.row_number().over(
        order_by=(queued.backs_off, queued.priority.desc(), queued.share, queued.created_at, queued.id)
    )
    positions = sa.select(queued.id, (position - 1).label("ahead")).subquery().c
    rows = session.execute(sa.select(positions.id, positions.ahead).where(positions.id.in_(job_ids)))
    return {row.id: row.ahead for row in rows}


def _device_kind_for(device: str, memory: Mapping[str, int | None]) -> str:
    """The kind of device that a job gets on a worker with these, where it asks for `device`."""
    if device != "auto":
        return device
    return "cuda" if "cuda" in memory else "cpu"


def _fits_memory(limit: int | None) -> sa.ColumnElement[bool]:
    return sa.true() if limit is None else sa.or_(Job.memory_bytes.is_(None), Job.memory_bytes <= limit)


def memory_by_device_kind(devices: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """The least memory of each kind of device, in bytes: on which device of a kind a job will run is not known."""
    least: dict[str, int | None] = {}
    for device in devices:
        kind, memory = str(device["kind"]), device["memory_bytes"]
        smallest = least.get(kind, memory)
        least[kind] = memory if smallest is None else smallest if memory is None else min(smallest, memory)
    return least


def _can_run(request: ResourceRequest, memory: Mapping[str, int | None]) -> bool:
    kind = _device_kind_for(request.device, memory)
    if kind not in memory:
        return False
    limit = memory[kind]
    return limit is None or request.memory_bytes is None or request.memory_bytes <= limit


class _StartEstimator:
    """Estimates when workers come free, as if every job took as long as recent ones did on average."""

    def __init__(self, session: Session, now: datetime) -> None:
        self._session = session
        self._now = now
        self._starts: dict[frozenset[str], list[datetime]] = {}

    def estimate(self, able: frozenset[str], ahead: int) -> datetime | None:
        """When one of the workers `able` comes free for a job with so many ahead; null where too little is known.

        The estimate is in whole minutes, so that a job's snapshot does not change with every query.
        """
        if not able or ahead > _MAX_ESTIMATED_AHEAD:
            return None
        if able not in self._starts:
            self._starts[able] = self._simulate(able)
        starts = self._starts[able]
        return _round_up_to_minute(starts[ahead]) if ahead < len(starts) else None

    def _simulate(self, able: frozenset[str]) -> list[datetime]:
        """The estimated start for 0, 1, ... jobs ahead: each job goes to the worker that comes free first."""
        held = [job for job in self._held if job.lease_owner in able]
        free_at = [self._now] * (len(able) - len({job.lease_owner for job in held}))
        for job in held:
            end = _estimate_end(job, self._now, self._mean_duration)
            if end is None:
                return []
            free_at.append(end)
        heapq.heapify(free_at)
        starts = [free_at[0]]
        while self._mean_duration is not None and len(starts) <= _MAX_ESTIMATED_AHEAD:
            heapq.heapreplace(free_at, free_at[0] + self._mean_duration)
            starts.append(free_at[0])
        return starts

    @cached_property
    def _mean_duration(self) -> timedelta | None:
        return _mean_recent_duration(self._session)

    @cached_property
    def _held(self) -> Sequence[Job]:
        return self._session.scalars(sa.select(Job).where(Job.status.in_(HELD), Job.lease_owner.is_not(None))).all()


def _round_up_to_minute(moment: datetime) -> datetime:
    return moment + (_EPOCH - moment) % _MINUTE


def _estimate_end(job: Job, now: datetime, mean_duration: timedelta | None) -> datetime | None:
    if job.eta_seconds is not None and job.progress_at is not None:
        return max(now, job.progress_at + timedelta(seconds=job.eta_seconds))
    if mean_duration is None or job.started_at is None:
        return None
    return max(now, job.started_at + mean_duration)


def _mean_recent_duration(session: Session) -> timedelta | None:
    """The mean duration of the jobs that succeeded last; null before the first."""
    ended = session.execute(
        sa.select(Job.started_at, Job.finished_at)
        .where(Job.status == JobStatus.SUCCEEDED)
        .order_by(Job.finished_at.desc())
        .limit(_RECENT_JOBS)
    )
    durations = [finished - started for started, finished in ended if started is not None and finished is not None]
    return sum(durations, timedelta()) / len(durations) if durations else None
