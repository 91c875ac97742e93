"""Leases of workers on jobs: claim a job, renew the lease by heartbeats, settle the attempt, reap expired leases.

No function commits. Every lease is compared by the database's clock.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.end_counts.repository import count_end
from domain.errors import LostLease
from domain.generations import is_newer
from domain.jobs.fleet import device_kind_for
from domain.jobs.forecast import learn_from
from domain.jobs.models import Job, JobAttempt, JobLog
from domain.jobs.queue import other_workers, runnable_on
from domain.jobs.queue_order import first_in_line, next_of_project, projects_at_quota
from domain.jobs.quotas import may_run_one_more
from domain.jobs.retries import NO_WAIT, RetryPolicy, decide_retry, is_claimable, passed_over_by
from domain.jobs.states import (
    CANCELLED,
    HELD,
    SUCCEEDED,
    TERMINAL,
    WAIT_EXCEEDED,
    WORKER_LOST,
    AttemptEnd,
    AttemptOutcome,
    EndReason,
    JobStatus,
    StopRequest,
    transitions_after_attempt,
)
from domain.jobs.transitions import NewEvent, lock_claimed_job, record_events, transition
from domain.jobs.usage import record_ended_attempt
from domain.workers.models import DrainMode, Worker
from pocl.events import RESUMABLE_KINDS, CheckpointKind
from pocl.spec import DistillationSpec

_ANY_DEVICE: Final[Mapping[str, int | None]] = {"cpu": None, "cuda": None}
_MAX_RESUME_CANDIDATES: Final = 5
_REAP_BATCH_SIZE: Final = 100
_MAX_LOGS: Final = 20
"""Of so many attempts of a job the logs are kept, the newest."""
_LOG_DROPPED: Final = f"[This log was dropped: those of the newest {_MAX_LOGS} attempts are kept.]\n"
_MAX_PASSED_OVER: Final = 100
"""Jobs that a claim passes over; more are not looked at."""
_STORED_SPEC_INVALID: Final = EndReason(
    "spec_invalid",
    "This version of the service cannot read the stored specification.",
    "system",
    False,
    "Submit the job as a new one.",
)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A committed training state that an attempt may resume from."""

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
    """The lease of one attempt on a job, and all that the attempt needs to begin."""

    job_id: str
    project: str
    token: int
    """The fencing token; it is the attempt's number, counted from 1."""
    spec: DistillationSpec
    """The resolved specification."""
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    """Training states to resume from: those of earlier attempts, newest first, then that of the parent job. A corrupt
    one is passed over for the next."""
    memory_bytes: int | None = None
    """The estimated memory of the job; null where its models were not at hand."""
    needs_training_state: bool = False
    """Whether the job is a branch, or a retry of one: from the start of the run it would be another experiment."""
    parent_job_id: str | None = None
    """The job that this one retries or branches from, whose ranking it may reuse."""
    events_offset: int = 0
    """Bytes of `events.jsonl` that are in the rows; an attempt starts with a file of its own."""
    runtime_left_seconds: float | None = None
    """What is left of the job's `max_runtime_seconds`; null without a limit."""
    request_id: str | None = None
    """The id of the request that made the job; null where none did."""
    traceparent: str | None = None
    """The span of that request, which the attempt's span has as its parent; null where it was not traced."""

    @property
    def attempt(self) -> int:
        return self.token

    @property
    def checkpoint(self) -> StoredCheckpoint | None:
        """The newest training state; null for a fresh start."""
        return self.checkpoints[0] if self.checkpoints else None


def claim_next(
    session: Session,
    *,
    worker: str,
    lease_seconds: float,
    memory: Mapping[str, int | None] = _ANY_DEVICE,
    retry: RetryPolicy = NO_WAIT,
) -> Claim | None:
    """Claim the next queued job that the worker can run; null where there is none.

    Jobs come by priority, then by fair share (the project with fewer jobs held by workers first), then by age. Two
    workers that claim at once get two jobs, or one gets none. A job that waits after a failure is passed over, as is
    one that failed on this worker where another fits, and one whose project has as many running as it may.

    Args:
        lease_seconds: how long the lease lasts; a worker whose last heartbeat is older is none that fits.
        memory: bytes of each kind of device that the worker has; null: not known, so taken to be enough.
    """
    passed_over = passed_over_by(
        session, worker[:200], lambda: other_workers(session, worker, within_seconds=lease_seconds), retry
    )
    full = projects_at_quota(session)
    while (job := _next_queued_job(session, memory, passed_over, retry, full)) is not None:
        if not may_run_one_more(session, job.project):
            # Another worker has claimed one of the project meanwhile.
            full.append(job.project)
            continue
        spec = _read_spec(job)
        if spec is None and is_newer(session):
            # A newer version took it: a newer worker can read it.
            passed_over.append(job.id)
            if len(passed_over) > _MAX_PASSED_OVER:
                return None
            continue
        claim = _claim(session, job, spec, worker, lease_seconds, memory)
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
        .returning(Job, _drain_mode_of_owner()),
        execution_options={"synchronize_session": False, "populate_existing": True},
    ).all()
    if not rows:
        raise LostLease
    job, drain_mode = rows[0]
    request = job.stop_request
    if drain_mode == "release" and (request is None or request.waits_for_stage_end):
        return StopRequest.RELEASE
    return request


def record_resumed_lease(session: Session, claim: Claim, reason: str, seconds: float) -> None:
    """Record that the attempt renewed its lease after a silence for which it would have been lost.

    Args:
        reason: a code for why no heartbeat came.
        seconds: how long none came.

    Raises:
        LostLease: the attempt no longer holds the job.
    """
    job = lock_claimed_job(session, claim.job_id, claim.token)
    data = {"attempt": claim.token, "reason": reason, "seconds": round(seconds, 1)}
    record_events(session, job, [NewEvent("lease_resumed", data)], token=claim.token)


def settle(
    session: Session,
    claim: Claim,
    outcome: AttemptOutcome,
    *,
    retry: RetryPolicy = NO_WAIT,
    seconds_run: float | None = None,
) -> JobStatus:
    """End the attempt, with the transitions of :func:`domain.jobs.states.transitions_after_attempt`.

    A job that is being cancelled ends as cancelled whatever the outcome.

    Args:
        seconds_run: how long the attempt has run by a clock that is never set; null: by that of the database.

    Returns:
        the state of the job afterwards.

    Raises:
        LostLease: the attempt no longer holds the job, or was settled already.
    """
    job = lock_claimed_job(session, claim.job_id, claim.token)
    return _end_attempt(session, job, outcome, retry, seconds_run=seconds_run)


def extend_expired(session: Session, *, lease_seconds: float, since: datetime | None) -> int:
    """Grant one more lease to attempts whose lease expired, and as much time to limits that ran out meanwhile.

    For a time in which no heartbeat could arrive: the database was unavailable, the machine was suspended, or its clock
    was put forward.

    Args:
        since: when leases were last looked at; null: never, so that every expired lease is extended.

    Returns:
        how many leases were extended.
    """
    now = session.scalars(sa.select(db_now())).one()
    expired = Job.lease_expires_at < now
    extended = session.execute(
        sa.update(Job)
        .where(Job.status.in_(HELD), expired if since is None else sa.and_(expired, Job.lease_expires_at >= since))
        .values(lease_expires_at=db_now(lease_seconds))
        .returning(Job.id),
        execution_options={"synchronize_session": False},
    ).all()
    if since is not None:
        for column in (Job.waits_until, Job.runs_until):
            passed = sa.select(Job.id, column).where(column >= since, column < now)
            for job_id, limit in session.execute(passed).all():
                if limit is not None:
                    session.execute(
                        sa.update(Job).where(Job.id == job_id, column == limit).values({column: now + (limit - since)})
                    )
    return len(extended)


def shorten_leases(session: Session, *, lease_seconds: float) -> int:
    """Cut leases that last longer than any heartbeat grants: the clock of the database was put back.

    Returns:
        how many were cut.
    """
    cut = session.execute(
        sa.update(Job)
        .where(Job.status.in_(HELD), Job.lease_expires_at > db_now(2 * lease_seconds))
        .values(lease_expires_at=db_now(lease_seconds))
        .returning(Job.id),
        execution_options={"synchronize_session": False},
    ).all()
    return len(cut)


def reap_expired(session: Session) -> list[str]:
    """End attempts whose lease expired, at most 100 at once. Returns the ids of their jobs.

    A job that was being cancelled ends as cancelled, also where no attempt holds it any more; another goes back
    to the queue while attempts are left.
    """
    expired = session.scalars(
        sa.select(Job)
        .where(Job.status.in_(HELD), sa.or_(Job.lease_expires_at < db_now(), Job.lease_token.is_(None)))
        .order_by(Job.lease_expires_at)
        .limit(_REAP_BATCH_SIZE)
        .with_for_update(skip_locked=True),
        execution_options={"populate_existing": True},
    ).all()
    for job in expired:
        _end_attempt(session, job, AttemptOutcome(AttemptEnd.LOST, WORKER_LOST), NO_WAIT)
    return [job.id for job in expired]


def expire_waiting(session: Session) -> list[str]:
    """Fail jobs that waited for their first attempt for longer than their `max_wait_seconds`, at most 100 at once.
    Returns their ids.
    """
    overdue = session.scalars(
        sa.select(Job)
        .where(Job.status == JobStatus.QUEUED, Job.started_at.is_(None), Job.waits_until < db_now())
        .limit(_REAP_BATCH_SIZE)
        .with_for_update(skip_locked=True),
        execution_options={"populate_existing": True},
    ).all()
    for job in overdue:
        transition(session, job, JobStatus.FAILED, reason=WAIT_EXCEEDED)
    return [job.id for job in overdue]


def _drain_mode_of_owner() -> sa.ScalarSelect[DrainMode | None]:
    return sa.select(Worker.drain).where(Worker.name == Job.lease_owner).correlate(Job).scalar_subquery()


def _next_queued_job(
    session: Session,
    memory: Mapping[str, int | None],
    passed_over: list[str],
    retry: RetryPolicy,
    full: list[str],
) -> Job | None:
    """Lock the job that comes first of those that nobody is claiming; null where there is none.

    Where another worker is claiming the first job of a project, that counts as held, and the next one of the same
    project takes its place: the first jobs of the others are read once.
    """
    conditions = sa.and_(runnable_on(memory), is_claimable(retry))
    if full:
        conditions = sa.and_(conditions, Job.project.not_in(full))
    passed = list(passed_over)
    heads = first_in_line(session, sa.and_(conditions, Job.id.not_in(passed)) if passed else conditions)
    heapq.heapify(heads)
    while heads:
        head = heads[0]
        job = session.scalars(
            sa.select(Job)
            .where(Job.id == head.job_id, Job.status == JobStatus.QUEUED)
            .with_for_update(skip_locked=True),
            execution_options={"populate_existing": True},
        ).one_or_none()
        if job is not None:
            return job
        passed.append(head.job_id)
        following = next_of_project(session, sa.and_(conditions, Job.id.not_in(passed)), head)
        if following is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, following)
    return None


def _claim(
    session: Session,
    job: Job,
    spec: DistillationSpec | None,
    worker: str,
    lease_seconds: float,
    memory: Mapping[str, int | None],
) -> Claim | None:
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
            "not_before": None,
            "started_at": job.started_at or db_now(),
            "runs_until": None if job.runtime_left_seconds is None else db_now(job.runtime_left_seconds),
        },
    )
    attempt = JobAttempt(job_id=job.id, number=token, worker=worker[:200], device=device_kind_for(job.device, memory))
    session.add(attempt)
    _drop_old_logs(session, job.id, newest=token)
    session.flush()
    if spec is None:
        # A row that an older version wrote must not stop the queue.
        _end_attempt(session, job, AttemptOutcome.failed(_STORED_SPEC_INVALID), NO_WAIT)
        return None
    return Claim(
        job.id,
        job.project,
        token,
        spec,
        _training_states(session, job),
        parent_job_id=job.parent_job_id,
        memory_bytes=job.memory_bytes,
        needs_training_state=job.branch_point is not None,
        runtime_left_seconds=job.runtime_left_seconds,
        request_id=job.request_id,
        traceparent=job.traceparent,
    )


def _read_spec(job: Job) -> DistillationSpec | None:
    """The stored specification; null where this version cannot read it."""
    try:
        return DistillationSpec.model_validate(job.spec)
    except ValidationError:
        return None


def _drop_old_logs(session: Session, job_id: str, *, newest: int) -> None:
    """Drop the log of the attempt that is one too many; those before it were dropped in their time."""
    dropped = newest - _MAX_LOGS
    session.execute(sa.delete(JobLog).where(JobLog.job_id == job_id, JobLog.attempt == dropped))
    session.execute(sa.delete(JobLog).where(JobLog.job_id == job_id, JobLog.attempt == newest - _MAX_LOGS))
    session.execute(
        sa.update(JobAttempt)
        .where(JobAttempt.job_id == job_id, JobAttempt.number == dropped)
        .values(log_tail=_LOG_DROPPED)
    )


def _training_states(session: Session, job: Job) -> tuple[StoredCheckpoint, ...]:
    own = session.scalars(
        sa.select(Checkpoint)
        .where(Checkpoint.job_id == job.id, Checkpoint.kind.in_(RESUMABLE_KINDS))
        .order_by(Checkpoint.step.desc(), Checkpoint.id.desc())
        .limit(_MAX_RESUME_CANDIDATES)
    ).all()
    inherited = session.scalars(sa.select(Checkpoint).where(Checkpoint.id == job.starts_from)).all()
    return tuple(
        StoredCheckpoint(row.id, row.kind, row.step, row.stage, row.store_key, row.size_bytes, row.manifest_sha256)
        for row in (*own, *inherited)
    )


def _end_attempt(
    session: Session, job: Job, outcome: AttemptOutcome, policy: RetryPolicy, *, seconds_run: float | None = None
) -> JobStatus:
    changes = _runtime_columns(session, job, seconds_run)
    attempts_left, not_before = job.max_attempts - job.attempts_spent, None
    if outcome.end is AttemptEnd.RELEASED:
        changes["attempts_spent"] = job.attempts_spent - 1
    elif outcome.may_pass:
        retry = decide_retry(session, job, outcome, policy)
        changes["attempts_spent"] = retry.attempts_spent
        attempts_left, not_before = retry.attempts_left, retry.not_before
    token = job.lease_token
    for status in transitions_after_attempt(job.status, outcome, attempts_left=attempts_left):
        reason = _end_reason_for(status, outcome) if status in TERMINAL else None
        details: dict[str, Any] = {}
        if status is JobStatus.RECOVERING:
            details["reason"] = outcome.reason.as_json()
        elif status is JobStatus.QUEUED and not_before is not None:
            changes["not_before"] = not_before
            details["not_before"] = not_before.isoformat()
        job = transition(session, job, status, reason=reason, token=token, changes=changes, details=details)
        # The first transition releases the lease; the next one follows under the same row lock.
        token, changes = None, {}
    session.execute(
        sa.update(JobAttempt)
        .where(JobAttempt.job_id == job.id, JobAttempt.number == job.token)
        .values(ended_at=db_now(), end=outcome.end, end_reason=outcome.reason.as_json())
    )
    attempt = record_ended_attempt(session, job, job.token)
    if attempt is not None and outcome.end is AttemptEnd.SUCCEEDED:
        learn_from(session, job, attempt)
    count_end(session, "attempt", outcome.end, fault=outcome.reason.fault, code=outcome.reason.code)
    return job.status


def _runtime_columns(session: Session, job: Job, seconds_run: float | None) -> dict[str, Any]:
    """The columns of what is left of the job's running time once the present attempt has ended."""
    if job.runs_until is None:
        return {}
    if seconds_run is not None and job.runtime_left_seconds is not None:
        left = job.runtime_left_seconds - seconds_run
    else:
        left = (job.runs_until - session.scalars(sa.select(db_now())).one()).total_seconds()
    return {"runtime_left_seconds": max(0.0, left), "runs_until": None}


def _end_reason_for(status: JobStatus, outcome: AttemptOutcome) -> EndReason:
    return {JobStatus.CANCELLED: CANCELLED, JobStatus.SUCCEEDED: SUCCEEDED}.get(status, outcome.reason)
