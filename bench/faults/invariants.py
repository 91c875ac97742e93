"""What the rows and files of a service say about the jobs that it accepted."""

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
from pocl.storage.manifest import verify

Law = Callable[[bool, str], None]
"""Whether something holds, and what it means if not."""


@dataclass
class InvariantReport:
    ends: Counter[str] = field(default_factory=Counter)
    """How the jobs ended."""
    attempts: Counter[str] = field(default_factory=Counter)
    """How their attempts ended."""
    max_attempts: int = 0
    wrong: list[str] = field(default_factory=list)
    """One sentence for each law that was broken."""

    def text(self) -> str:
        def listed(counter: Mapping[str, int]) -> str:
            return ", ".join(f"{count} {name}" for name, count in sorted(counter.items()))

        return "\n".join(
            [
                f"jobs: {listed(self.ends)}",
                f"attempts: {listed(self.attempts)}; at most {self.max_attempts} a job",
            ]
        )


def check_invariants(
    database: Database, store: ArtifactStore, submitted: Mapping[str, str], wanted: Mapping[str, str]
) -> InvariantReport:
    """Look at every job of `submitted`.

    Args:
        submitted: variant by job id.
        wanted: SHA-256 of the final weights by variant.
    """
    found = InvariantReport()
    with database.transaction(write=False) as session:
        for job_id, variant in submitted.items():
            job = session.get(Job, job_id)
            if job is None:
                found.wrong.append(f"{job_id} was accepted and is gone")
                continue
            _look_at(session, store, job, wanted[variant], found)
    return found


def _look_at(session: Session, store: ArtifactStore, job: Job, weights: str, found: InvariantReport) -> None:
    events = session.scalars(sa.select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)).all()
    attempts = session.scalars(sa.select(JobAttempt).where(JobAttempt.job_id == job.id)).all()
    found.ends[str(job.status)] += 1
    found.attempts.update(str(attempt.end or "open") for attempt in attempts)
    found.max_attempts = max(found.max_attempts, job.attempts_spent)

    def law(holds: bool, broken: str) -> None:
        if not holds:
            found.wrong.append(f"{job.id} {broken}")

    moves = [JobStatus(event.data["to"]) for event in events if event.type == "status"]
    law(job.status in TERMINAL, f"has not ended: {job.status}")
    law(job.status is not JobStatus.FAILED, f"failed: {(job.end_reason or {}).get('code')}")
    law(sum(move in TERMINAL for move in moves) == 1, f"ended {sum(move in TERMINAL for move in moves)} times")
    law([event.seq for event in events] == list(range(1, job.event_seq + 1)), "has gaps in its events")
    law(job.attempts_spent <= job.max_attempts, "spent more attempts than it may")
    law(all(attempt.end is not None for attempt in attempts), "has an attempt that never ended")
    law(job.lease_token is None, "is still held")
    ended_well = [attempt for attempt in attempts if attempt.end is AttemptEnd.SUCCEEDED]
    law(len(ended_well) == (job.status is JobStatus.SUCCEEDED), f"succeeded in {len(ended_well)} attempts")
    # In the order of the commits. A writer that had lost its lease would show as an attempt that comes again.
    makers = [attempt for event in events if (attempt := _maker_of(session, event)) is not None]
    law(makers == sorted(makers), "has a checkpoint of an attempt that had lost it")
    _look_at_files(session, store, job, weights, law)


def _look_at_files(session: Session, store: ArtifactStore, job: Job, weights: str, law: Law) -> None:
    for checkpoint in session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job.id)):
        try:
            verify(store.directory(checkpoint.store_key))
        except (ArtifactCorrupt, ArtifactNotFound, CheckpointCorrupt) as error:
            law(False, f"has a damaged {checkpoint.kind} checkpoint: {error}")
            continue
        if checkpoint.kind == "final":
            manifest = store.manifest(checkpoint.store_key)
            (made,) = (file.sha256 for file in manifest.files if file.path == "model.safetensors")
            law(made == weights, "ended in other weights than an undisturbed run")


def _maker_of(session: Session, event: JobEvent) -> int | None:
    if event.type != "checkpoint":
        return None
    return session.scalars(sa.select(Checkpoint.attempt).where(Checkpoint.id == event.data["id"])).one_or_none()
