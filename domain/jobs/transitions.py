"""State transitions of a job, and every other write of its row: the one place that changes it.

Each write is a compare-and-set on the version that was read (an optimistic lock) and, for an attempt, on its fencing
token. It numbers the events that it records in the same statement, so their numbers have no gap and rise in commit
order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now
from domain.end_counts.repository import count_end
from domain.errors import Conflict, IllegalTransition, LostLease
from domain.jobs.models import CLEARED_WITH_LEASE, Job, JobEvent, JobStage
from domain.jobs.publication_start import start_publication
from domain.jobs.states import (
    ALLOWED_ACTIONS,
    HELD,
    TERMINAL,
    EndReason,
    JobStatus,
    StageStatus,
    explain_illegal_transition,
    terminal_status_of,
)
from domain.trackers.repository import mark_pending

_CLEARED_WITH_LEASE: Final = {
    column.key: None for column in sa.inspect(Job).columns if column.info.get(CLEARED_WITH_LEASE, False)
}
_STAGE_STATUS_AFTER: Final = {
    JobStatus.SUCCEEDED: StageStatus.SUCCEEDED,
    JobStatus.FAILED: StageStatus.FAILED,
    JobStatus.CANCELLED: StageStatus.CANCELLED,
}
"""What becomes of a running stage when its job's lease is released; `pending` for any other state of the job."""


@dataclass(frozen=True)
class NewEvent:
    """An event that has no sequence number yet."""

    type: str
    data: Mapping[str, Any]
    at: datetime | None = None
    """When it happened; null for now, by the database's clock."""


def lock_job(session: Session, job_id: str) -> Job | None:
    """Read a job afresh, with a row lock until the transaction ends; null where there is none."""
    return session.scalars(
        sa.select(Job).where(Job.id == job_id).with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()


def lock_claimed_job(session: Session, job_id: str, token: int) -> Job:
    """Read and lock a job for the attempt whose fencing token it carries.

    Raises:
        LostLease: the job is held by another attempt, or by none.
    """
    job = lock_job(session, job_id)
    if job is None or job.lease_token != token:
        raise LostLease
    return job


def transition(
    session: Session,
    job: Job,
    to: JobStatus,
    *,
    reason: EndReason | None = None,
    token: int | None = None,
    changes: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Job:
    """Bring a job into the state `to`, and record the transition as an event.

    Args:
        reason: why the job ended: needed for a terminal state, which must be the one that the reason stands for.
        token: the fencing token of the attempt that writes; null for a write on the client's behalf.
        changes: further columns to set, by name.
        details: what the event says besides the two states and the attempt.

    Raises:
        IllegalTransition: there is no such transition.
        LostLease: the attempt with this token no longer holds the job.
        Conflict: the job changed since it was read.
    """
    explanation = explain_illegal_transition(job.status, to)
    if explanation is not None:
        raise IllegalTransition(explanation, allowed=ALLOWED_ACTIONS[job.status])
    values: dict[str, Any] = {**(changes or {}), "status": to}
    data: dict[str, Any] = {"from": job.status, "to": to, "attempt": values.get("token", job.token)}
    data |= details or {}
    if to not in HELD:
        values |= _CLEARED_WITH_LEASE
        _end_running_stages(session, job.id, to)
    if to in TERMINAL:
        values |= _terminal_columns(to, reason)
        data["reason"] = values["end_reason"]
    changed = _compare_and_set(session, job, values, [NewEvent("status", data)], token)
    if job.trackers and to not in HELD:
        mark_pending(session, job.id)
    if to is JobStatus.SUCCEEDED:
        start_publication(session, job)
    if to in TERMINAL and reason is not None:
        count_end(session, "job", to, fault=reason.fault, code=reason.code)
    return changed


def record_events(
    session: Session,
    job: Job,
    events: Sequence[NewEvent],
    *,
    token: int | None,
    changes: Mapping[str, Any] | None = None,
) -> Job:
    """Record events, and set columns other than the status.

    Args:
        token: the fencing token of the attempt that writes; null for a write on the client's behalf.

    Raises:
        LostLease: the attempt with this token no longer holds the job.
        Conflict: the job changed since it was read.
    """
    return _compare_and_set(session, job, changes or {}, events, token)


def _terminal_columns(to: JobStatus, reason: EndReason | None) -> dict[str, Any]:
    if reason is None or terminal_status_of(reason) is not to:
        raise ValueError(f"a job that is {to} needs a reason that stands for it")
    columns: dict[str, Any] = {"end_reason": reason.as_json(), "finished_at": db_now()}
    if to is JobStatus.SUCCEEDED:
        columns["percent"] = 100.0
    return columns


def _end_running_stages(session: Session, job_id: str, to: JobStatus) -> None:
    session.flush()
    session.execute(
        sa.update(JobStage)
        .where(JobStage.job_id == job_id, JobStage.status == StageStatus.RUNNING)
        .values(status=_STAGE_STATUS_AFTER.get(to, StageStatus.PENDING))
    )


def _compare_and_set(
    session: Session, job: Job, values: Mapping[str, Any], events: Sequence[NewEvent], token: int | None
) -> Job:
    statement = (
        sa.update(Job)
        .where(Job.id == job.id, Job.version == job.version)
        .values(
            **values,
            version=Job.version + 1,
            event_seq=Job.event_seq + len(events),
            updated_at=db_now(),
        )
        .returning(Job)
    )
    if token is not None:
        statement = statement.where(Job.lease_token == token)
    # All rows are fetched here: SQLite cannot commit while a RETURNING is half read.
    updated = session.scalars(
        statement, execution_options={"synchronize_session": False, "populate_existing": True}
    ).all()
    if not updated:
        raise Conflict if token is None else LostLease
    first = updated[0].event_seq - len(events) + 1
    session.add_all(
        JobEvent(job_id=job.id, seq=seq, type=event.type, data=dict(event.data), at=event.at or db_now())
        for seq, event in enumerate(events, start=first)
    )
    session.flush()
    return updated[0]
