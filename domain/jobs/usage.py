"""What jobs use: the device time of their attempts, and the bytes of their files. No function commits."""

from collections import Counter
from datetime import date
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.datasets.models import Dataset
from domain.db import db_now
from domain.exports.models import CheckpointExport
from domain.jobs.models import Job, JobArtifact, JobAttempt
from domain.jobs.states import HELD
from domain.usage import repository
from domain.usage.repository import AttemptUse, DayUsage, record_storage


def record_ended_attempt(session: Session, job: Job, number: int) -> JobAttempt | None:
    """Record what an attempt used whose end was written in this transaction; null where there is no such attempt."""
    attempt = session.get(JobAttempt, (job.id, number), populate_existing=True)
    if attempt is not None and attempt.ended_at is not None:
        repository.record_attempt(session, _use_of(attempt, job.project), attempt.ended_at)
    return attempt


def list_usage(session: Session, project: str, *, since: date, until: date) -> list[DayUsage]:
    """What a project used on each day, running attempts included: see :func:`domain.usage.repository.list_usage`."""
    held = (
        sa.select(JobAttempt)
        .join(Job, sa.and_(Job.id == JobAttempt.job_id, Job.token == JobAttempt.number))
        .where(Job.project == project, Job.status.in_(HELD), JobAttempt.ended_at.is_(None))
    )
    running = [_use_of(attempt, project) for attempt in session.scalars(held)]
    now = session.scalars(sa.select(db_now())).one()
    return repository.list_usage(session, project, since=since, until=until, running=running, now=now)


def storage_bytes(session: Session, project: str | None = None) -> Counter[str]:
    """The bytes of checkpoints, their exports, data sets and results, by project; of one project or of all."""
    sizes: Counter[str] = Counter()
    statements: tuple[sa.Select[str, Any], ...] = (
        sa.select(Checkpoint.project, sa.func.sum(Checkpoint.size_bytes)).group_by(Checkpoint.project),
        sa.select(CheckpointExport.project, sa.func.sum(CheckpointExport.size_bytes))
        .where(CheckpointExport.size_bytes.is_not(None))
        .group_by(CheckpointExport.project),
        sa.select(Dataset.project, sa.func.sum(Dataset.size_bytes)).group_by(Dataset.project),
        sa.select(Job.project, sa.func.sum(JobArtifact.size_bytes))
        .join(Job, Job.id == JobArtifact.job_id)
        .group_by(Job.project),
    )
    projects = (Checkpoint.project, CheckpointExport.project, Dataset.project, Job.project)
    for statement, column in zip(statements, projects, strict=True):
        filtered = statement if project is None else statement.where(column == project)
        for name, size in session.execute(filtered):
            sizes[name] += int(size)
    return sizes


def storage_bytes_by_kind(session: Session) -> dict[str, int]:
    """The bytes of the same files, of all projects together, by what they are."""
    sizes = {
        "checkpoints": Checkpoint.size_bytes,
        "exports": CheckpointExport.size_bytes,
        "datasets": Dataset.size_bytes,
        "artifacts": JobArtifact.size_bytes,
    }
    return {kind: int(session.scalar(sa.select(sa.func.sum(column))) or 0) for kind, column in sizes.items()}


def bytes_of_job(job_id: str) -> sa.ColumnElement[int]:
    """The bytes of the checkpoints, exports and artifacts that a job has now, as an expression for its column. Files
    that its checkpoints share on the disk count for each.
    """
    sums = (
        sa.select(sa.cast(sa.func.coalesce(sa.func.sum(record.size_bytes), 0), sa.BigInteger))
        .where(record.job_id == job_id)
        .scalar_subquery()
        for record in (Checkpoint, CheckpointExport, JobArtifact)
    )
    checkpoints, exports, artifacts = sums
    return checkpoints + exports + artifacts


def record_storage_today(session: Session) -> None:
    """Record how many bytes the files of each project take now."""
    now = session.scalars(sa.select(db_now())).one()
    record_storage(session, now.date(), storage_bytes(session))


def _use_of(attempt: JobAttempt, project: str) -> AttemptUse:
    return AttemptUse(
        project=project,
        job_id=attempt.job_id,
        attempt=attempt.number,
        worker=attempt.worker,
        device=attempt.device,
        started_at=attempt.started_at,
    )
