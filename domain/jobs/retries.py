"""Retries of jobs that failed by a fault that may pass: how often, when, and on which worker.

What an attempt costs follows from its end:

- a worker that finds itself sick after the end (:attr:`domain.jobs.states.AttemptOutcome.worker_is_sick`) costs the job
  nothing;
- a typed failure spends one attempt for each worker, however often the same worker fails the job;
- a crash and a lost lease spend one each.

A stored training state that lies further than all before it gives every attempt back. Without progress a job fails once
its attempts are spent, or after `max_failures` failures of whatever kind.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now
from domain.jobs.models import Job, JobAttempt
from domain.jobs.states import AttemptEnd, AttemptOutcome, JobStatus
from domain.settings import Settings

FAILURE_ENDS: Final = (AttemptEnd.FAILED, AttemptEnd.CRASHED)
"""Ends of attempts that tell against the worker on which they came about."""
_MAX_DOUBLINGS: Final = 30
_MAX_PASSED_OVER: Final = 1000


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter, as the settings have it."""

    base_seconds: float = 10
    """The longest wait after a first failure; 0: no wait."""
    max_seconds: float = 600
    """The longest wait after any failure."""
    max_failures: int = 12
    """How many failures without progress a job survives."""
    random: Callable[[], float] = random.random
    """Numbers from 0 to 1: the jitter, so that jobs that failed together do not come back together."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(settings.retry_seconds, settings.max_retry_seconds, settings.max_failures)

    def delay(self, failures: int) -> float:
        """Seconds to wait after the n-th failure in a row: from half to the whole of `base_seconds` * 2^(n - 1), which
        is at most `max_seconds`.
        """
        longest: float = min(self.max_seconds, self.base_seconds * 2 ** min(max(failures - 1, 0), _MAX_DOUBLINGS))
        return longest * (0.5 + 0.5 * self.random())


NO_WAIT: Final = RetryPolicy(base_seconds=0)
"""Retries at once, as many as the default policy allows."""


@dataclass(frozen=True)
class RetryDecision:
    """What a failed attempt costs its job, and when the next one may begin."""

    attempts_spent: int
    attempts_left: int
    not_before: datetime | None
    """Null: at once."""


@dataclass(frozen=True)
class OtherWorker:
    """A live worker that accepts jobs."""

    name: str
    can_run: Callable[[Job], bool]
    """Whether it has the device and the memory that a job needs."""


def decide_retry(session: Session, job: Job, outcome: AttemptOutcome, policy: RetryPolicy) -> RetryDecision:
    """What the end of the running attempt of a job means for its next one.

    A lost lease waits for nothing: its worker is gone, and another goes on at once.

    Args:
        outcome: one that :attr:`~domain.jobs.states.AttemptOutcome.may_pass`.
    """
    earlier = _workers_of_failures(session, job)
    spends = outcome.end is not AttemptEnd.FAILED or job.lease_owner not in earlier
    spent = job.attempts_spent - int(outcome.worker_is_sick or not spends)
    left = job.max_attempts - spent
    if outcome.end is AttemptEnd.LOST:
        return RetryDecision(spent, left, None)
    failures = len(earlier) + 1
    delay = policy.delay(failures)
    not_before = session.scalars(sa.select(db_now(delay))).one() if delay > 0 else None
    return RetryDecision(spent, left if failures <= policy.max_failures else 0, not_before)


def is_claimable(policy: RetryPolicy) -> sa.ColumnElement[bool]:
    """Whether a queued job need not wait for its `not_before`.

    One that lies further ahead than any wait was set before the clock of the database was put back: it counts as over.
    """
    return sa.or_(Job.not_before.is_(None), Job.not_before <= db_now(), Job.not_before > db_now(policy.max_seconds + 1))


def count_claimable(session: Session, policy: RetryPolicy, *, limit: int) -> int:
    """The number of queued jobs that a worker might claim now, counted as far as `limit`."""
    claimable = sa.select(Job.id).where(Job.status == JobStatus.QUEUED, is_claimable(policy)).limit(limit)
    return session.scalar(sa.select(sa.func.count()).select_from(claimable.subquery())) or 0


def passed_over_by(
    session: Session, worker: str, others: Callable[[], Sequence[OtherWorker]], policy: RetryPolicy
) -> list[str]:
    """Ids of queued jobs that the worker leaves to others: it has failed them, and another worker fits that has not.

    Once `max_seconds` have passed since it failed a job the worker may take it again, whoever else there is.

    Args:
        others: the other live workers; asked for only where the worker has failed a queued job.
    """
    # Found by the index of workers, and then by their ids, so that the length of the queue does not matter.
    failed = sa.select(JobAttempt.job_id).where(
        JobAttempt.worker == worker,
        JobAttempt.ended_at > db_now(-policy.max_seconds),
        JobAttempt.end.in_(FAILURE_ENDS),
    )
    job_ids = session.scalars(failed.distinct().limit(_MAX_PASSED_OVER)).all()
    if not job_ids:
        return []
    failed_here = session.scalars(sa.select(Job).where(Job.id.in_(job_ids), Job.status == JobStatus.QUEUED)).all()
    if not failed_here:
        return []
    available = others()
    failed_on = {job.id: set(_workers_of_failures(session, job)) for job in failed_here}
    return [
        job.id
        for job in failed_here
        if worker in failed_on[job.id]
        and any(other.name not in failed_on[job.id] and other.can_run(job) for other in available)
    ]


def _workers_of_failures(session: Session, job: Job) -> list[str]:
    """The worker of each attempt that failed or crashed since the job's last progress, oldest first."""
    statement = sa.select(JobAttempt.worker).where(
        JobAttempt.job_id == job.id, JobAttempt.number >= job.progress_token, JobAttempt.end.in_(FAILURE_ENDS)
    )
    return list(session.scalars(statement.order_by(JobAttempt.number)))
