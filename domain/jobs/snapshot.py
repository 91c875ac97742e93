"""What state jobs are in, as little as tells one state from another."""

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, ResourceRequest, queue_positions
from domain.jobs.states import TERMINAL, JobStatus


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """What tells one state of a job from another: all that is shown of it changes with this alone."""

    project: str
    version: int
    event_seq: int
    """The number of its newest event."""
    ended: bool
    place: QueuePosition | None
    """In the queue, which other jobs and workers change; null unless it is queued."""


def job_snapshots(session: Session, job_ids: Collection[str], *, worker_seconds: float) -> dict[str, JobSnapshot]:
    """The state of each of these jobs that is there, by id.

    Args:
        worker_seconds: a worker that was not heard of for longer does not count.
    """
    statement = sa.select(
        Job.id, Job.project, Job.version, Job.event_seq, Job.status, Job.device, Job.memory_bytes
    ).where(Job.id.in_(job_ids))
    rows = session.execute(statement).all()
    needs = {row.id: ResourceRequest(row.device, row.memory_bytes) for row in rows if row.status is JobStatus.QUEUED}
    places = queue_positions(session, needs, worker_seconds=worker_seconds)
    return {
        row.id: JobSnapshot(row.project, row.version, row.event_seq, row.status in TERMINAL, places.get(row.id))
        for row in rows
    }
