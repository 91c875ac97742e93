"""Snapshots of jobs: the few columns that tell whether anything that clients see of a job has changed."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from functools import cache

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.jobs.fleet import ResourceRequest
from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, queue_positions
from domain.jobs.states import TERMINAL, JobStatus
from domain.projects.models import Project


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """A job at one moment: what the API shows of it changes only together with one of these values."""

    project: str
    version: int
    event_seq: int
    """The sequence number of the job's newest event."""
    ended: bool
    queue_position: QueuePosition | None
    """Its position in the queue, which changes with other jobs and workers too; null unless it is queued."""


def job_snapshots(session: Session, job_ids: Collection[str], *, worker_seconds: float) -> dict[str, JobSnapshot]:
    """Snapshots of those of these jobs that exist, by id.

    Args:
        worker_seconds: a worker whose last heartbeat is older does not count in the queue.
    """
    rows = session.execute(_statement(), {"job_ids": list(job_ids)}).all()
    requests = {
        row.id: ResourceRequest(row.device, row.memory_bytes, row.not_before)
        for row in rows
        if row.status is JobStatus.QUEUED
    }
    limits_running = any(row.id in requests and row.max_jobs_running is not None for row in rows)
    positions = queue_positions(session, requests, worker_seconds=worker_seconds, limits_running=limits_running)
    return {
        row.id: JobSnapshot(row.project, row.version, row.event_seq, row.status in TERMINAL, positions.get(row.id))
        for row in rows
    }


# To make the statement takes as long as to execute it.
@cache
def _statement() -> sa.Select[str, str, int, int, JobStatus, str, int | None, datetime | None, int | None]:
    """The statement with the parameter `job_ids`."""
    read = (Job.id, Job.project, Job.version, Job.event_seq, Job.status, Job.device, Job.memory_bytes, Job.not_before)
    statement = sa.select(*read, Project.max_jobs_running).outerjoin(Project, Project.id == Job.project)
    return statement.where(Job.id.in_(sa.bindparam("job_ids", expanding=True)))
