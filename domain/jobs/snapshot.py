"""Snapshots of jobs: the few columns that tell whether anything that clients see of a job has changed."""

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, ResourceRequest, queue_positions
from domain.jobs.states import TERMINAL, JobStatus


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
    statement = sa.select(
        Job.id, Job.project, Job.version, Job.event_seq, Job.status, Job.device, Job.memory_bytes, Job.not_before
    ).where(Job.id.in_(job_ids))
    rows = session.execute(statement).all()
    requests = {
        row.id: ResourceRequest(row.device, row.memory_bytes, row.not_before)
        for row in rows
        if row.status is JobStatus.QUEUED
    }
    positions = queue_positions(session, requests, worker_seconds=worker_seconds)
    return {
        row.id: JobSnapshot(row.project, row.version, row.event_seq, row.status in TERMINAL, positions.get(row.id))
        for row in rows
    }
