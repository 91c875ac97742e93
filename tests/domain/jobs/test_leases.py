"""Leases: claims, heartbeats, the end of attempts, and the reaper."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from threading import Barrier

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.db import Database, db_now
from domain.errors import IllegalTransition, LostLease
from domain.jobs.actions import cancel_job
from domain.jobs.engine_logs import LogChunk, append_log
from domain.jobs.event_recorder import add_artifact, add_checkpoint, apply_events
from domain.jobs.leases import Claim, claim_next, heartbeat, reap_expired, settle
from domain.jobs.models import Job, JobAttempt, JobEvent
from domain.jobs.states import (
    HELD,
    TERMINAL,
    TRANSITIONS,
    WORKER_LOST,
    AttemptEnd,
    AttemptOutcome,
    EndReason,
    JobStatus,
    StopRequest,
)
from domain.jobs.transitions import lock_claimed_job, transition
from tests.support.rows import add_job, claim_job, dump_tables, envelopes, reload_job, set_status, step_logged

REFUSED = EndReason("loss_diverged", "The loss is not a number.", "user", False, "Lower the learning rate.")
CRASH = EndReason("killed", "The engine was killed by signal 9.", "capacity", True, "Use a smaller student.")


def claim_one(database: Database, *, lease_seconds: float = 60) -> Claim | None:
    with database.transaction(write=True) as session:
        return claim_next(session, worker="worker-1", lease_seconds=lease_seconds)


def end(database: Database, claim: Claim, outcome: AttemptOutcome) -> JobStatus:
    with database.transaction(write=True) as session:
        return settle(session, claim, outcome)


def reap(database: Database) -> list[str]:
    with database.transaction(write=True) as session:
        return reap_expired(session)


def test_a_claim_on_an_empty_queue_returns_nothing(database: Database) -> None:
    assert claim_one(database) is None


def test_a_claim_takes_the_highest_priority_and_then_the_oldest(database: Database) -> None:
    with database.transaction(write=True) as session:
        for name, priority in (("old", 0), ("new", 0), ("urgent", 5)):
            add_job(session, id=f"job_{name}", priority=priority)
    order = [claim.job_id for claim in iter(lambda: claim_one(database), None)]
    assert order == ["job_urgent", "job_old", "job_new"]


def test_a_claim_passes_over_jobs_for_another_device(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session, id="job_gpu", device="cuda")
        add_job(session, id="job_any")
        claim = claim_next(session, worker="cpu-box", lease_seconds=60, memory={"cpu": None})
        assert claim is not None
        assert claim.job_id == "job_any"
        assert claim_next(session, worker="cpu-box", lease_seconds=60, memory={"cpu": None}) is None


def test_concurrent_claims_get_different_jobs(database: Database) -> None:
    with database.transaction(write=True) as session:
        jobs = {add_job(session).id for _ in range(5)}
    barrier = Barrier(8)

    def claim_together(_: int) -> Claim | None:
        barrier.wait()
        return claim_one(database)

    with ThreadPoolExecutor(8) as pool:
        claims = [claim for claim in pool.map(claim_together, range(8)) if claim is not None]
    assert sorted(claim.job_id for claim in claims) == sorted(jobs)
    assert all(reload_job(database, claim).attempts_spent == 1 for claim in claims)


def test_a_claim_that_is_not_committed_hides_its_job_from_others(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session)
    with ThreadPoolExecutor(1) as other:
        with database.transaction(write=True) as session:
            assert claim_next(session, worker="first", lease_seconds=60) is not None
            # PostgreSQL passes over the locked row, SQLite waits for the commit.
            second = other.submit(claim_one, database)
        assert second.result() is None


def test_a_claim_that_is_rolled_back_leaves_the_job_in_the_queue(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session)
    with suppress(RuntimeError), database.transaction(write=True) as session:
        claim_next(session, worker="worker-1", lease_seconds=60)
        raise RuntimeError
    assert claim_one(database) is not None


def test_an_invalid_stored_specification_fails_its_job_and_not_the_queue(database: Database) -> None:
    with database.transaction(write=True) as session:
        broken = add_job(session, id="job_broken", spec={"of": "another version"})
        add_job(session, id="job_good")
    claim = claim_one(database)
    assert claim is not None
    assert claim.job_id == "job_good"
    with database.transaction(write=False) as session:
        failed = session.get_one(Job, broken.id)
        assert failed.status is JobStatus.FAILED
        assert failed.reason is not None
        assert failed.reason.code == "spec_invalid"


def test_a_heartbeat_renews_the_lease_and_keeps_the_version(database: Database) -> None:
    claim = claim_job(database, lease_seconds=1)
    before = reload_job(database, claim)
    with database.transaction(write=True) as session:
        assert heartbeat(session, claim, 600) is None
    after = reload_job(database, claim)
    assert before.lease_expires_at is not None
    assert after.lease_expires_at is not None
    assert (after.lease_expires_at - before.lease_expires_at).total_seconds() > 500
    assert after.version == before.version


@pytest.mark.parametrize(
    ("status", "stop_request"),
    [(JobStatus.CANCELLING, StopRequest.CANCEL), (JobStatus.PAUSING, StopRequest.PAUSE), (JobStatus.RUNNING, None)],
)
def test_a_heartbeat_brings_the_stop_request_of_the_client(
    database: Database, status: JobStatus, stop_request: StopRequest | None
) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        set_status(session, claim.job_id, status)
        assert heartbeat(session, claim, 60) is stop_request


def test_success_ends_the_job_and_its_attempt(database: Database) -> None:
    claim = claim_job(database)
    assert end(database, claim, AttemptOutcome.succeeded()) is JobStatus.SUCCEEDED
    job = reload_job(database, claim)
    assert (job.percent, job.lease_token, job.finished_at is not None) == (100.0, None, True)
    with database.transaction(write=False) as session:
        attempt = session.get_one(JobAttempt, (claim.job_id, 1))
        assert attempt.end is AttemptEnd.SUCCEEDED
        assert attempt.ended_at is not None


def test_a_typed_failure_is_kept_with_its_reason(database: Database) -> None:
    claim = claim_job(database)
    assert end(database, claim, AttemptOutcome.failed(REFUSED)) is JobStatus.FAILED
    assert reload_job(database, claim).reason == REFUSED


def test_a_released_job_is_queued_again_and_its_attempt_is_not_spent(database: Database) -> None:
    claim = claim_job(database, max_attempts=1)
    for _ in range(3):
        assert end(database, claim, AttemptOutcome.released()) is JobStatus.QUEUED
        assert reload_job(database, claim).attempts_spent == 0
        again = claim_one(database)
        assert again is not None
        assert again.token == claim.token + 1
        claim = again


def test_a_job_that_crashes_in_every_attempt_fails_with_the_last_reason(database: Database) -> None:
    claim = claim_job(database, max_attempts=2)
    assert end(database, claim, AttemptOutcome.crashed(CRASH)) is JobStatus.QUEUED
    second = claim_one(database)
    assert second is not None
    assert end(database, second, AttemptOutcome.crashed(CRASH)) is JobStatus.FAILED
    assert reload_job(database, claim).reason == CRASH
    assert claim_one(database) is None


@pytest.mark.parametrize("outcome", [AttemptOutcome.released(), AttemptOutcome.cancelled(), AttemptOutcome.succeeded()])
def test_a_cancelled_job_ends_as_cancelled_whatever_the_outcome(database: Database, outcome: AttemptOutcome) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        cancel_job(session, "default", claim.job_id)
    assert end(database, claim, outcome) is JobStatus.CANCELLED


def test_a_pausing_job_that_is_released_is_paused(database: Database) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        set_status(session, claim.job_id, JobStatus.PAUSING)
    assert end(database, claim, AttemptOutcome.released()) is JobStatus.PAUSED
    assert claim_one(database) is None


def test_settling_twice_is_refused_and_changes_nothing(database: Database) -> None:
    claim = claim_job(database)
    end(database, claim, AttemptOutcome.succeeded())
    before = dump_tables(database)
    with pytest.raises(LostLease):
        end(database, claim, AttemptOutcome.failed(CRASH))
    assert dump_tables(database) == before


def test_the_reaper_leaves_live_leases_alone(database: Database) -> None:
    claim_job(database)
    before = dump_tables(database)
    assert reap(database) == []
    assert dump_tables(database) == before


def test_the_reaper_queues_the_job_of_a_lost_worker_again(database: Database) -> None:
    claim = claim_job(database, lease_seconds=-1)
    assert reap(database) == [claim.job_id]
    job = reload_job(database, claim)
    assert (job.status, job.lease_token, job.attempts_spent) == (JobStatus.QUEUED, None, 1)
    assert transitions_of(database, claim.job_id)[-2:] == [("preparing", "recovering"), ("recovering", "queued")]
    assert reap(database) == []


def test_the_reaper_fails_a_job_without_attempts_left(database: Database) -> None:
    claim = claim_job(database, lease_seconds=-1, max_attempts=1)
    reap(database)
    assert reload_job(database, claim).reason == WORKER_LOST


def test_the_reaper_cancels_a_cancelling_job_of_a_lost_worker(database: Database) -> None:
    claim = claim_job(database, lease_seconds=-1)
    with database.transaction(write=True) as session:
        cancel_job(session, "default", claim.job_id)
    reap(database)
    assert reload_job(database, claim).status is JobStatus.CANCELLED


def test_the_reaper_cancels_a_job_that_was_cancelled_while_recovering(database: Database) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        job = lock_claimed_job(session, claim.job_id, claim.token)
        transition(session, job, JobStatus.RECOVERING, token=claim.token)
        cancel_job(session, "default", claim.job_id)
    reap(database)
    assert reload_job(database, claim).status is JobStatus.CANCELLED


def test_an_expired_lease_that_was_not_reaped_can_be_renewed(database: Database) -> None:
    claim = claim_job(database, lease_seconds=-1)
    with database.transaction(write=True) as session:
        assert heartbeat(session, claim, 60) is None
    assert reap(database) == []


def test_concurrent_reapers_end_an_attempt_once(database: Database) -> None:
    claim = claim_job(database, lease_seconds=-1)
    with ThreadPoolExecutor(4) as pool:
        reaped = [job for jobs in pool.map(lambda _: reap(database), range(4)) for job in jobs]
    assert reaped == [claim.job_id]
    assert reload_job(database, claim).attempts_spent == 1


WRITES: list[Callable[[Database, Claim], object]] = [
    lambda database, claim: end(database, claim, AttemptOutcome.succeeded()),
    lambda database, claim: in_transaction(database, apply_events, claim, envelopes(step_logged(5)), offset=99),
    lambda database, claim: in_transaction(
        database,
        add_checkpoint,
        claim,
        kind="final",
        step=20,
        stage=None,
        store_key="jobs/stale",
        size_bytes=1,
        manifest_sha256="0" * 64,
    ),
    lambda database, claim: in_transaction(
        database, add_artifact, claim, kind="report", store_key="jobs/stale", size_bytes=1, sha256="0" * 64
    ),
    lambda database, claim: in_transaction(database, append_log, claim, [LogChunk(0, b"stale")], max_bytes=9),
    lambda database, claim: in_transaction(database, heartbeat, claim, 60),
]


def in_transaction(database: Database, write: Callable[..., object], *arguments: object, **options: object) -> object:
    with database.transaction(write=True) as session:
        return write(session, *arguments, **options)


@pytest.mark.parametrize("write", WRITES, ids=["settle", "events", "checkpoint", "artifact", "log", "heartbeat"])
@pytest.mark.parametrize("taken", [False, True], ids=["queued", "taken"])
def test_an_attempt_that_lost_its_lease_changes_nothing(
    database: Database, write: Callable[[Database, Claim], object], taken: bool
) -> None:
    claim = claim_job(database, lease_seconds=-1)
    reap(database)
    if taken:
        assert claim_one(database) is not None
    before = dump_tables(database)
    with pytest.raises(LostLease):
        write(database, claim)
    assert dump_tables(database) == before


def transitions_of(database: Database, job_id: str) -> list[tuple[str, str]]:
    statement = sa.select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == "status")
    with database.transaction(write=False) as session:
        return [(event.data["from"], event.data["to"]) for event in session.scalars(statement.order_by(JobEvent.seq))]


class JobHistory:
    """One job, and the actions of clients, workers and the reaper on it, in any order."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.claims: list[Claim] = []
        with database.transaction(write=True) as session:
            session.execute(sa.delete(Job))
            self.job_id = add_job(session, max_attempts=2).id

    def apply(self, name: str) -> None:
        if name == "claim":
            claim = claim_one(self.database)
            self.claims += [claim] if claim is not None else []
        elif name == "train" and self.claims:
            job = reload_job(self.database, self.claims[-1])
            in_transaction(
                self.database, apply_events, self.claims[-1], envelopes(step_logged(1)), offset=job.events_offset + 1
            )
        elif name == "lose":
            with self.database.transaction(write=True) as session:
                session.execute(sa.update(Job).where(Job.lease_token.is_not(None)).values(lease_expires_at=db_now(-1)))
                reap_expired(session)
        elif name == "cancel":
            in_transaction(self.database, cancel_job, "default", self.job_id)
        elif name in OUTCOMES and self.claims:
            end(self.database, self.claims[-1], OUTCOMES[name])

    def job(self) -> Job:
        with self.database.transaction(write=False) as session:
            return session.get_one(Job, self.job_id)


OUTCOMES = {
    "succeed": AttemptOutcome.succeeded(),
    "fail": AttemptOutcome.failed(REFUSED),
    "fail for now": AttemptOutcome.failed(CRASH),
    "fail on a sick worker": replace(AttemptOutcome.failed(CRASH), worker_is_sick=True),
    "release": AttemptOutcome.released(),
    "crash": AttemptOutcome.crashed(CRASH),
}


@given(st.lists(st.sampled_from(["claim", "train", "lose", "cancel", *OUTCOMES]), max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_invariants_of_a_job_hold_under_any_sequence_of_actions(database: Database, actions: list[str]) -> None:
    history = JobHistory(database)
    for name in actions:
        before = history.job()
        try:
            history.apply(name)
        except (LostLease, IllegalTransition):
            assert history.job().version == before.version
        after = history.job()
        assert before.status not in TERMINAL or after.version == before.version
        assert (after.lease_token is not None) == (after.status in HELD)
        assert (after.end_reason is not None) == (after.finished_at is not None) == (after.status in TERMINAL)
        assert 0 <= after.attempts_spent <= after.max_attempts
        assert after.token >= before.token
    transitions = transitions_of(database, history.job_id)
    assert all(JobStatus(to) in TRANSITIONS[JobStatus(source)] for source, to in transitions)
    assert all(earlier[1] == later[0] for earlier, later in pairwise(transitions))
