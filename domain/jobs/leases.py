"""A worker's hold on a job: claim it, keep it, give it back, and take it from a worker that is lost.

No function commits. Every lease is compared by the database's clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint, CheckpointKind
from domain.db import db_now
from domain.errors import LostLease
from domain.jobs.models import Job, JobAttempt
from domain.jobs.queue import order_by_fair_share, runnable_on
from domain.jobs.states import (
    CANCELLED,
    HELD,
    RELEASED,
    SUCCEEDED,
    TERMINAL,
    WAIT_EXCEEDED,
    WORKER_LOST,
    AttemptEnd,
    EndReason,
    JobStatus,
    transitions_after_attempt,
)
from domain.jobs.transitions import lock_claimed_job, transition
from domain.workers.models import DrainMode, Worker
from pocl.spec import DistillationSpec

_ANY: Mapping[str, int | None] = {"cpu": None, "cuda": None}
_RESUME_CANDIDATES = 5
_REAPED_AT_ONCE = 100
_SPEC_UNREADABLE = EndReason(
    "spec_invalid",
    "This version of the service cannot read the stored specification.",
    "system",
    False,
    "Submit the job again.",
)


class StopRequest(StrEnum):
    """Why an attempt is to stop its engine. It then settles with the outcome that is named here."""

    CANCEL = "cancel"
    """The client cancels the job: cancelled."""
    PAUSE = "pause"
    """The client pauses the job: released."""
    PAUSE_AT_STAGE_END = "pause_at_stage_end"
    """The client pauses the job once its stage has ended: released."""
    EXPIRE = "expire"
    """The job has used up its `max_runtime_seconds`: failed."""
    RELEASE = "release"
    """The worker shuts down or is drained: released."""
    STALL = "stall"
    """The engine reports nothing any more, which its worker notices: crashed."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A committed training state that an attempt may continue from."""

    id: str
    kind: CheckpointKind
    step: int
    stage: int | None
    store_key: str
    """The directory, relative to the artifact store."""
    size_bytes: int
    manifest_sha256: str


@dataclass(frozen=True)
class Claim:
    """One attempt's right to work on a job, and all that it needs to begin."""

    job_id: str
    project: str
    token: int
    """The fencing token; it is the attempt's number, counted from 1."""
    spec: DistillationSpec
    """Resolved."""
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    """Training states of earlier attempts, newest first, and then that of the job that it descends from; a corrupt
    one is passed over for the next."""
    parent_job_id: str | None = None
    """The job whose ranking it may begin with."""
    events_offset: int = 0
    """Bytes of `events.jsonl` that are in the rows; an attempt starts with a file of its own."""

    @property
    def attempt(self) -> int:
        return self.token

    @property
    def checkpoint(self) -> StoredCheckpoint | None:
        """The newest training state; null for a fresh start."""
        return self.checkpoints[0] if self.checkpoints else None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, as its worker saw it."""

    end: AttemptEnd
    reason: EndReason

    @classmethod
    def succeeded(cls) -> Self:
        return cls(AttemptEnd.SUCCEEDED, SUCCEEDED)

    @classmethod
    def failed(cls, reason: EndReason) -> Self:
        """The engine said why it ended; another attempt would end alike."""
        return cls(AttemptEnd.FAILED, reason)

    @classmethod
    def cancelled(cls) -> Self:
        return cls(AttemptEnd.CANCELLED, CANCELLED)

    @classmethod
    def released(cls) -> Self:
        """The worker shuts down, or the job pauses: not spent."""
        return cls(AttemptEnd.RELEASED, RELEASED)

    @classmethod
    def crashed(cls, reason: EndReason) -> Self:
        """The engine died; `reason` becomes the job's if no attempt is left."""
        return cls(AttemptEnd.CRASHED, reason)


def claim_next(
    session: Session,
    *,
    worker: str,
    lease_seconds: float,
    memory: Mapping[str, int | None] = _ANY,
) -> Claim | None:
    """Take the first queued job that fits. Null where there is none.

    The order is by priority, then by how few jobs of its project are at work, then by age. Two workers that ask at
    once get two jobs, or one gets none.

    Args:
        memory: bytes of each kind of device that the worker has; null: not known, so taken to be enough.
    """
    while (job := _first_queued(session, memory)) is not None:
        claim = _claim(session, job, worker, lease_seconds)
        if claim is not None:
            return claim
    return None


def heartbeat(session: Session, claim: Claim, lease_seconds: float) -> StopRequest | None:
    """Renew the lease, and return the stop request that is pending; null where the attempt may go on.

    Raises:
        LostLease: the attempt no longer holds the job: stop the engine and write nothing more.
    """
    rows = session.execute(
        sa.update(Job)
        .where(Job.id == claim.job_id, Job.lease_token == claim.token)
        .values(lease_expires_at=db_now(lease_seconds))
        .returning(Job.status, Job.pause_at, Job.runs_until < db_now(), _drain_of_owner()),
        execution_options={"synchronize_session": False},
    ).all()
    if not rows:
        raise LostLease
    status, pause_at, expired, drain = rows[0]
    if status is JobStatus.CANCELLING:
        return StopRequest.CANCEL
    if expired:
        return StopRequest.EXPIRE
    if status is JobStatus.PAUSING:
        at_stage_end = pause_at == "stage_end" and drain != "release"
        return StopRequest.PAUSE_AT_STAGE_END if at_stage_end else StopRequest.PAUSE
    return StopRequest.RELEASE if drain == "release" else None


def settle(session: Session, claim: Claim, outcome: Outcome) -> JobStatus:
    """End the attempt, and move the job where that leads: see :func:`domain.jobs.states.transitions_after_attempt`.

    A job that is being cancelled ends as cancelled whatever the outcome.

    Raises:
        LostLease: the attempt no longer holds the job, or was settled already.
    """
    job = lock_claimed_job(session, claim.job_id, claim.token)
    return _end_attempt(session, job, outcome)


def reap_expired(session: Session) -> list[str]:
    """Take jobs from workers whose lease expired; at most 100 at once. Returns the ids of the jobs moved.

    A job that was being cancelled ends as cancelled, also where no attempt holds it any more; another goes back
    to the queue while attempts are left.
    """
    expired = session.scalars(
        sa.select(Job)
        .where(Job.status.in_(HELD), sa.or_(Job.lease_expires_at < db_now(), Job.lease_token.is_(None)))
        .order_by(Job.lease_expires_at)
        .limit(_REAPED_AT_ONCE)
        .with_for_update(skip_locked=True),
        execution_options={"populate_existing": True},
    ).all()
    for job in expired:
        _end_attempt(session, job, Outcome(AttemptEnd.LOST, WORKER_LOST))
    return [job.id for job in expired]


def expire_waiting(session: Session) -> list[str]:
    """End jobs that waited for their first attempt longer than they may; at most 100 at once. Returns their ids."""
    overdue = session.scalars(
        sa.select(Job)
        .where(Job.status == JobStatus.QUEUED, Job.started_at.is_(None), Job.waits_until < db_now())
        .limit(_REAPED_AT_ONCE)
        .with_for_update(skip_locked=True),
        execution_options={"populate_existing": True},
    ).all()
    for job in overdue:
        transition(session, job, JobStatus.FAILED, reason=WAIT_EXCEEDED)
    return [job.id for job in overdue]


def _drain_of_owner() -> sa.ScalarSelect[DrainMode | None]:
    return sa.select(Worker.drain).where(Worker.name == Job.lease_owner).correlate(Job).scalar_subquery()


def _first_queued(session: Session, memory: Mapping[str, int | None]) -> Job | None:
    statement, at_work = order_by_fair_share(sa.select(Job).where(Job.status == JobStatus.QUEUED, runnable_on(memory)))
    return session.scalars(
        statement.order_by(Job.priority.desc(), at_work, Job.created_at, Job.id)
        .limit(1)
        .with_for_update(of=Job, skip_locked=True),
        execution_options={"populate_existing": True},
    ).one_or_none()


def _claim(session: Session, job: Job, worker: str, lease_seconds: float) -> Claim | None:
    token = job.token + 1
    job = transition(
        session,
        job,
        JobStatus.PREPARING,
        changes={
            "token": token,
            "attempts_spent": job.attempts_spent + 1,
            "lease_owner": worker[:200],
            "lease_token": token,
            "lease_expires_at": db_now(lease_seconds),
            "events_offset": 0,
            "started_at": job.started_at or db_now(),
            "runs_until": None if job.runtime_left_seconds is None else db_now(job.runtime_left_seconds),
        },
    )
    session.add(JobAttempt(job_id=job.id, number=token, worker=worker[:200]))
    session.flush()
    try:
        spec = DistillationSpec.model_validate(job.spec)
    except ValidationError:
        # A row that an older version wrote must not stop the queue.
        _end_attempt(session, job, Outcome.failed(_SPEC_UNREADABLE))
        return None
    return Claim(job.id, job.project, token, spec, _training_states(session, job), job.parent_job_id)


def _training_states(session: Session, job: Job) -> tuple[StoredCheckpoint, ...]:
    own = session.scalars(
        sa.select(Checkpoint)
        .where(Checkpoint.job_id == job.id, Checkpoint.kind.in_(("training", "stage")))
        .order_by(Checkpoint.step.desc(), Checkpoint.id.desc())
        .limit(_RESUME_CANDIDATES)
    ).all()
    first = session.scalars(sa.select(Checkpoint).where(Checkpoint.id == job.starts_from)).all()
    return tuple(
        StoredCheckpoint(row.id, row.kind, row.step, row.stage, row.store_key, row.size_bytes, row.manifest_sha256)
        for row in (*own, *first)
    )


def _end_attempt(session: Session, job: Job, outcome: Outcome) -> JobStatus:
    changes: dict[str, Any] = {}
    if outcome.end is AttemptEnd.RELEASED:
        changes["attempts_spent"] = job.attempts_spent - 1
    if job.runs_until is not None:
        now = session.scalars(sa.select(db_now())).one()
        changes |= {"runtime_left_seconds": max(0.0, (job.runs_until - now).total_seconds()), "runs_until": None}
    token = job.lease_token
    for status in transitions_after_attempt(
        job.status, outcome.end, attempts_left=job.max_attempts - job.attempts_spent
    ):
        reason = _reason_of(status, outcome) if status in TERMINAL else None
        job = transition(session, job, status, reason=reason, token=token, changes=changes)
        # The first move lets the lease go; the next is made in its wake, under the same lock.
        token, changes = None, {}
    session.execute(
        sa.update(JobAttempt)
        .where(JobAttempt.job_id == job.id, JobAttempt.number == job.token)
        .values(ended_at=db_now(), end=outcome.end, end_reason=outcome.reason.as_json())
    )
    return job.status


def _reason_of(status: JobStatus, outcome: Outcome) -> EndReason:
    return {JobStatus.CANCELLED: CANCELLED, JobStatus.SUCCEEDED: SUCCEEDED}.get(status, outcome.reason)
