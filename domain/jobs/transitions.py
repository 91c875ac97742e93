"""The one door through which a job's row changes.

Each write is guarded by the version that was read and, for an attempt, by its fencing token. It numbers the
events that it records in the same statement, so their numbers have no gap and rise in commit order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now
from domain.errors import Conflict, IllegalTransition, LostLease
from domain.jobs.models import Job, JobEvent, JobStage
from domain.jobs.states import (
    HELD,
    TERMINAL,
    TRANSITIONS,
    EndReason,
    JobStatus,
    StageStatus,
    explain_illegal_transition,
    terminal_status_of,
)

_LET_GO: Final = dict.fromkeys(
    (
        "lease_owner",
        "lease_token",
        "lease_expires_at",
        "phase",
        "phase_done",
        "phase_total",
        "phase_unit",
        "tokens_per_second",
        "eta_seconds",
        "eta_low_seconds",
        "eta_high_seconds",
        "pause_at",
    )
)
_STAGE_LET_GO: Final = {
    JobStatus.SUCCEEDED: StageStatus.SUCCEEDED,
    JobStatus.FAILED: StageStatus.FAILED,
    JobStatus.CANCELLED: StageStatus.CANCELLED,
}


@dataclass(frozen=True)
class NewEvent:
    """An event before it has its number."""

    type: str
    data: Mapping[str, Any]
    at: datetime | None = None
    """Null: now, by the database's clock."""


def lock_job(session: Session, job_id: str) -> Job | None:
    """Read a job afresh and keep every other writer from it until the transaction ends."""
    return session.scalars(
        sa.select(Job).where(Job.id == job_id).with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()


def lock_claimed_job(session: Session, job_id: str, token: int) -> Job:
    """Read and lock a job for the attempt that holds it.

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
) -> Job:
    """Move a job to `to` and record the move as an event.

    Args:
        reason: why the job ended; needed for a terminal state, which must be the one that it stands for.
        token: the fencing token of the attempt that writes; null for a write on the client's behalf.
        changes: columns that change with it.

    Raises:
        IllegalTransition: the move is not in the table.
        LostLease: `token` no longer holds the job.
        Conflict: the job changed since it was read.
    """
    refused = explain_illegal_transition(job.status, to)
    if refused is not None:
        raise IllegalTransition(refused, allowed=TRANSITIONS[job.status])
    values: dict[str, Any] = {**(changes or {}), "status": to}
    data: dict[str, Any] = {"from": job.status, "to": to, "attempt": values.get("token", job.token)}
    if to not in HELD:
        values |= _LET_GO
        _let_stages_go(session, job.id, to)
    if to in TERMINAL:
        values |= _ending(to, reason)
        data["reason"] = values["end_reason"]
    return _write(session, job, values, [NewEvent("status", data)], token)


def record_events(
    session: Session,
    job: Job,
    events: Sequence[NewEvent],
    *,
    token: int | None,
    changes: Mapping[str, Any] | None = None,
) -> Job:
    """Change columns other than the status, and record events.

    Args:
        token: the fencing token of the attempt that writes; null for a write on the client's behalf.

    Raises:
        LostLease: `token` no longer holds the job.
        Conflict: the job changed since it was read.
    """
    return _write(session, job, changes or {}, events, token)


def _ending(to: JobStatus, reason: EndReason | None) -> dict[str, Any]:
    if reason is None or terminal_status_of(reason) is not to:
        raise ValueError(f"a job that is {to} needs a reason that stands for it")
    ending: dict[str, Any] = {"end_reason": reason.as_json(), "finished_at": db_now()}
    if to is JobStatus.SUCCEEDED:
        ending["percent"] = 100.0
    return ending


def _let_stages_go(session: Session, job_id: str, to: JobStatus) -> None:
    session.flush()
    session.execute(
        sa.update(JobStage)
        .where(JobStage.job_id == job_id, JobStage.status == StageStatus.RUNNING)
        .values(status=_STAGE_LET_GO.get(to, StageStatus.PENDING))
    )


def _write(session: Session, job: Job, values: Mapping[str, Any], events: Sequence[NewEvent], token: int | None) -> Job:
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
    written = session.scalars(
        statement, execution_options={"synchronize_session": False, "populate_existing": True}
    ).all()
    if not written:
        raise Conflict if token is None else LostLease
    first = written[0].event_seq - len(events) + 1
    session.add_all(
        JobEvent(job_id=job.id, seq=seq, type=event.type, data=dict(event.data), at=event.at or db_now())
        for seq, event in enumerate(events, start=first)
    )
    session.flush()
    return written[0]
