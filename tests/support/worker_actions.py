"""What a worker writes about a job, each in a transaction of its own."""

from collections.abc import Sequence

from domain.db import Database
from domain.jobs.event_recorder import apply_events
from domain.jobs.leases import Claim, claim_next, settle
from domain.jobs.states import AttemptOutcome, JobStatus
from pocl.events import EventEnvelope


def claim_queued_job(database: Database, *, worker: str = "w1") -> Claim:
    """Claim the next job of the queue."""
    with database.transaction(write=True) as session:
        claim = claim_next(session, worker=worker, lease_seconds=600)
    assert claim is not None
    return claim


def write_events(database: Database, claim: Claim, events: Sequence[EventEnvelope], *, offset: int) -> None:
    """Record events of the engine, read up to `offset` of its file."""
    with database.transaction(write=True) as session:
        apply_events(session, claim, events, offset=offset)


def settle_attempt(database: Database, claim: Claim, outcome: AttemptOutcome) -> JobStatus:
    """End the attempt; the state that the job is in then."""
    with database.transaction(write=True) as session:
        return settle(session, claim, outcome)


def succeed_job(database: Database, claim: Claim) -> None:
    """End the attempt as successful, and with it the job."""
    assert settle_attempt(database, claim, AttemptOutcome.succeeded()) is JobStatus.SUCCEEDED
