"""The queue: the positions of jobs, why they wait, and their estimated start. No function commits."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session, defer

from domain.db import KeysetPage, db_now, kept_by_database
from domain.jobs.fleet import Fleet, ResourceRequest, can_run, device_kind_for, live_fleet
from domain.jobs.models import Job
from domain.jobs.queue_order import PositionCounter, count_ahead, projects_at_quota
from domain.jobs.retries import OtherWorker
from domain.jobs.start_estimates import estimate_start, round_up_to_minute
from domain.jobs.states import HELD, JobStatus

QueueReason = Literal[
    "jobs_ahead",
    "waiting_for_worker",
    "no_worker",
    "no_worker_fits",
    "workers_quarantined",
    "backing_off",
    "broker_unreachable",
    "project_quota",
]

_GIB: Final = 2**30
_NOW: Final = sa.select(db_now())


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
class QueuedJob:
    """A job in the queue."""

    job: Job
    """The row; in a list without its specifications."""
    position: QueuePosition


@dataclass(frozen=True)
class QueueTotals:
    """How busy the service is, all projects together."""

    queued: int
    """The jobs that wait for a worker."""
    running: int
    """The jobs that workers hold."""
    workers: int
    """The live workers that accept jobs."""
    workers_quarantined: int
    """The live workers that claim nothing until a check of themselves succeeds."""


def runnable_on(memory: Mapping[str, int | None]) -> sa.ColumnElement[bool]:
    """Whether a job can run on devices of these kinds, with so many bytes of memory each; null: not known.

    A worker without a device runs none.
    """
    if not memory:
        return sa.false()
    kinds = [("auto", memory.get(device_kind_for("auto", memory))), *memory.items()]
    return sa.or_(*(sa.and_(Job.device == kind, _fits_memory(limit)) for kind, limit in kinds))


def queue_position(session: Session, job: Job, *, worker_seconds: float) -> QueuePosition | None:
    """The position of the job in the queue; null unless it is queued. See :func:`queue_positions`."""
    if job.status is not JobStatus.QUEUED:
        return None
    requests = {job.id: ResourceRequest(job.device, job.memory_bytes, job.not_before)}
    return queue_positions(session, requests, worker_seconds=worker_seconds).get(job.id)


def queue_positions(
    session: Session, requests: Mapping[str, ResourceRequest], *, worker_seconds: float, limits_running: bool = True
) -> dict[str, QueuePosition]:
    """The positions of those of these jobs that are queued, in the queue of all projects.

    Projects share the workers fairly: the jobs of a project come in the order of priority and age, and the n-th waiting
    one counts as if the n - 1 before it were held by workers already.

    Args:
        requests: the resources that each job needs, by the job's id.
        worker_seconds: a worker whose last heartbeat is older does not count.
        limits_running: whether one of their projects may have a quota of running jobs.

    Returns:
        the position by the job's id.
    """
    if not requests:
        return {}
    over_quota = None if limits_running else ()
    fleet = live_fleet(session, worker_seconds)
    return _explain(session, requests, count_ahead(session, requests), fleet, over_quota)


def list_queued(
    session: Session, project: str, *, limit: int, after: int = 0, worker_seconds: float
) -> KeysetPage[QueuedJob]:
    """The queued jobs of a project in the order of the queue, after the position `after` in the queue of all.

    Args:
        worker_seconds: a worker whose last heartbeat is older does not count.
    """
    counter = kept_by_database(session, PositionCounter)
    places = counter.list_places(session, project, after=after, limit=limit + 1)
    if not places:
        return KeysetPage([], has_more=False)
    statement = sa.select(Job).where(Job.id.in_(list(places)[:limit]))
    jobs = {job.id: job for job in session.scalars(statement.options(defer(Job.posted_spec), defer(Job.spec)))}
    shown = [jobs[job_id] for job_id in places if job_id in jobs]
    requests = {job.id: ResourceRequest(job.device, job.memory_bytes, job.not_before) for job in shown}
    explained = _explain(session, requests, places, live_fleet(session, worker_seconds))
    return KeysetPage([QueuedJob(job, explained[job.id]) for job in shown], has_more=len(places) > limit)


def queue_totals(session: Session, *, worker_seconds: float) -> QueueTotals:
    """How busy the service is, all projects together.

    Args:
        worker_seconds: a worker whose last heartbeat is older does not count.
    """
    fleet = live_fleet(session, worker_seconds)
    counts = session.execute(
        sa.select(Job.status, sa.func.count().label("jobs"))
        .where(Job.status.in_((*HELD, JobStatus.QUEUED)))
        .group_by(Job.status)
    )
    by_status = {row.status: row.jobs for row in counts}
    queued = by_status.pop(JobStatus.QUEUED, 0)
    quarantined = len(fleet.workers) - fleet.accepting
    return QueueTotals(queued, sum(by_status.values()), fleet.accepting, quarantined)


def explain_new(
    session: Session,
    requests: Mapping[str, ResourceRequest],
    ahead_of: Mapping[str, int],
    fleets: Mapping[str, Fleet],
    *,
    limits_running: bool,
) -> dict[str, QueuePosition]:
    """The positions of jobs of a project that come to the queue now, each with as many jobs ahead, by the job's id.

    Args:
        fleets: the workers that were read for each job.
        limits_running: whether the project has a quota of running jobs.
    """
    over_quota = _find_over_quota(session, requests) if limits_running else ()
    return {
        job_id: _explain(session, {job_id: request}, ahead_of, fleets[job_id], over_quota)[job_id]
        for job_id, request in requests.items()
    }


def _explain(
    session: Session,
    requests: Mapping[str, ResourceRequest],
    ahead_of: Mapping[str, int],
    fleet: Fleet,
    over_quota: Collection[str] | None = None,
) -> dict[str, QueuePosition]:
    """The positions of queued jobs, each with as many jobs ahead, with the reason why it waits and its start.

    Args:
        requests: the resources of each of the jobs, by the job's id.
        over_quota: those whose project has as many running as its quota allows; null where that is to be read.
    """
    if over_quota is None:
        over_quota = _find_over_quota(session, requests)
    now = session.scalars(_NOW).one() if any(each.not_before is not None for each in requests.values()) else None
    positions = {}
    # A job that was claimed since the caller read its row has no position any more.
    for job_id, request in requests.items():
        if job_id not in ahead_of:
            continue
        ahead = ahead_of[job_id]
        able = fleet.able(request)
        reason: QueueReason = "jobs_ahead" if ahead else "waiting_for_worker"
        until = None
        if now is not None and request.not_before is not None and request.not_before > now:
            reason, until = "backing_off", request.not_before
        elif not able and fleet.able(request, quarantined=True):
            reason = "workers_quarantined"
        elif not able:
            reason = "no_worker_fits" if fleet.workers else "no_worker"
        elif job_id in over_quota:
            reason = "project_quota"
        elif fleet.woken == "broker_unreachable":
            reason = "broker_unreachable"
        starts_at = None if job_id in over_quota else estimate_start(session, able, ahead)
        if starts_at is not None and until is not None:
            starts_at = max(starts_at, round_up_to_minute(until))
        positions[job_id] = QueuePosition(ahead + 1, ahead, reason, starts_at, until)
    return positions


def _find_over_quota(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs whose project has as many running as its quota allows."""
    full = projects_at_quota(session)
    return set(session.scalars(sa.select(Job.id).where(Job.id.in_(job_ids), Job.project.in_(full)))) if full else set()


def explain_misfit(fleet: Fleet, request: ResourceRequest) -> str | None:
    """Why no live worker could run a job, as one sentence; null where one could, or none is there to compare with."""
    workers = [worker.memory for worker in fleet.workers]
    if not workers or any(can_run(request, memory) for memory in workers):
        return None
    if request.device != "auto" and not any(request.device in memory for memory in workers):
        present = " and ".join(sorted({kind for memory in workers for kind in memory})) or "no device"
        return f"The job asks for the device {request.device}, and the workers that are alive have {present}."
    limits = [memory.get(device_kind_for(request.device, memory)) or 0 for memory in workers]
    largest = max(limits)
    assert request.memory_bytes is not None, "without an estimate a device of the kind is enough"
    return (
        f"The job needs {request.memory_bytes / _GIB:.1f} GiB of memory on one device, and the largest of the workers"
        f" that are alive has {largest / _GIB:.1f} GiB."
    )


def other_workers(session: Session, worker: str, *, within_seconds: float) -> list[OtherWorker]:
    """The live workers besides this one that accept jobs."""

    def as_other(name: str, memory: Mapping[str, int | None]) -> OtherWorker:
        return OtherWorker(name, lambda job: can_run(ResourceRequest(job.device, job.memory_bytes), memory))

    return [
        as_other(each.name, each.memory)
        for each in live_fleet(session, within_seconds).workers
        if each.name != worker and not each.is_quarantined
    ]


def _fits_memory(limit: int | None) -> sa.ColumnElement[bool]:
    return sa.true() if limit is None else sa.or_(Job.memory_bytes.is_(None), Job.memory_bytes <= limit)
