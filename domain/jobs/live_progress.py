"""How far jobs are: what changes at every report of an engine, read for all jobs with one query."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.jobs.models import Job
from domain.jobs.states import JobStatus


@dataclass(frozen=True, slots=True)
class LiveProgress:
    """How far a job is at one moment: the columns of its row under their names."""

    status: JobStatus
    phase: str | None
    phase_done: int | None
    phase_total: int | None
    phase_unit: str | None
    percent: float
    step: int
    total_steps: int
    stage: int | None
    stages: int
    tokens_seen: int
    tokens_per_second: float | None
    progress_at: datetime | None
    eta_seconds: float | None
    eta_low_seconds: float | None
    eta_high_seconds: float | None
    log_bytes: int
    """How many bytes the logs of all its attempts have had so far."""


_COLUMNS = tuple(getattr(Job, name) for name in LiveProgress.__dataclass_fields__)


def live_progress(session: Session, job_ids: Collection[str]) -> dict[str, LiveProgress]:
    """How far those of these jobs are that exist, by id."""
    rows = session.execute(sa.select(Job.id, *_COLUMNS).where(Job.id.in_(job_ids)))
    return {job_id: LiveProgress(*columns) for job_id, *columns in rows}
