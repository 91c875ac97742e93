"""The invariants of a service: checks of the rows and files of the jobs that it accepted."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.checkpoints.models import Checkpoint
from domain.db import Database
from domain.jobs.models import Job, JobAttempt, JobEvent
from domain.jobs.states import TERMINAL, AttemptEnd, JobStatus
from pocl.errors import CheckpointCorrupt
from pocl.layout import WEIGHTS_FILE
from pocl.storage.manifest import verify

Check = Callable[[bool, str], None]
"""Called with whether an invariant holds, and what is wrong if it does not."""


@dataclass
class InvariantReport:
    """How the jobs and their attempts ended, and which invariants were violated."""

    statuses: Counter[str] = field(default_factory=Counter)
    """The number of jobs by status."""
    attempts: Counter[str] = field(default_factory=Counter)
    """The number of attempts by their end."""
    max_attempts: int = 0
    violations: list[str] = field(default_factory=list)
    """One sentence for each violation."""

    def text(self) -> str:
        def listed(counter: Mapping[str, int]) -> str:
            return ", ".join(f"{count} {name}" for name, count in sorted(counter.items()))

        return "\n".join(
            [
                f"jobs: {listed(self.statuses)}",
                f"attempts: {listed(self.attempts)}; at most {self.max_attempts} a job",
            ]
        )


def check_invariants(
    database: Database, store: ArtifactStore, submitted: Mapping[str, str], expected: Mapping[str, str]
) -> InvariantReport:
    """Check the invariants of every submitted job.

    Args:
        submitted: The variant of each job, by its id.
        expected: SHA-256 of the final weights without faults, by variant.
    """
    report = InvariantReport()
    with database.transaction(write=False) as session:
        for job_id, variant in submitted.items():
            job = session.get(Job, job_id)
            if job is None:
                report.violations.append(f"{job_id} was accepted and is gone")
                continue
            _check_job(session, store, job, expected[variant], report)
    return report


def _check_job(session: Session, store: ArtifactStore, job: Job, weights: str, report: InvariantReport) -> None:
    events = session.scalars(sa.select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)).all()
    attempts = session.scalars(sa.select(JobAttempt).where(JobAttempt.job_id == job.id)).all()
    report.statuses[str(job.status)] += 1
    report.attempts.update(str(attempt.end or "open") for attempt in attempts)
    report.max_attempts = max(report.max_attempts, job.attempts_spent)

    def check(holds: bool, violation: str) -> None:
        if not holds:
            report.violations.append(f"{job.id} {violation}")

    statuses = [JobStatus(event.data["to"]) for event in events if event.type == "status"]
    check(job.status in TERMINAL, f"has not ended: {job.status}")
    check(job.status is not JobStatus.FAILED, f"failed: {(job.end_reason or {}).get('code')}")
    check(
        sum(status in TERMINAL for status in statuses) == 1,
        f"ended {sum(status in TERMINAL for status in statuses)} times",
    )
    check([event.seq for event in events] == list(range(1, job.event_seq + 1)), "has gaps in its events")
    check(job.attempts_spent <= job.max_attempts, "spent more attempts than it may")
    check(all(attempt.end is not None for attempt in attempts), "has an attempt that never ended")
    check(job.lease_token is None, "still has a lease")
    succeeded = [attempt for attempt in attempts if attempt.end is AttemptEnd.SUCCEEDED]
    # A job that is cancelled while its last attempt ends is cancelled, whatever the outcome of the attempt.
    allowed = {JobStatus.SUCCEEDED: {1}, JobStatus.CANCELLED: {0, 1}}.get(job.status, {0})
    check(len(succeeded) in allowed, f"is {job.status} and succeeded in {len(succeeded)} attempts")
    # In the order of the commits. A writer without the lease would show as an attempt that comes after a later one.
    writers = [attempt for event in events if (attempt := _attempt_of(session, event)) is not None]
    check(writers == sorted(writers), "has a checkpoint of an attempt that had lost it")
    _check_files(session, store, job, weights, check)


def _check_files(session: Session, store: ArtifactStore, job: Job, weights: str, check: Check) -> None:
    for checkpoint in session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job.id)):
        try:
            verify(store.directory(checkpoint.store_key))
        except (ArtifactCorrupt, ArtifactNotFound, CheckpointCorrupt) as error:
            check(False, f"has a damaged {checkpoint.kind} checkpoint: {error}")
            continue
        if checkpoint.kind == "final":
            manifest = store.manifest(checkpoint.store_key)
            (sha256,) = (file.sha256 for file in manifest.files if file.path == WEIGHTS_FILE)
            check(sha256 == weights, "ended in other weights than a run without faults")


def _attempt_of(session: Session, event: JobEvent) -> int | None:
    if event.type != "checkpoint":
        return None
    return session.scalars(sa.select(Checkpoint.attempt).where(Checkpoint.id == event.data["id"])).one_or_none()
