"""Deletion of checkpoints: never one that is pinned or needed, and never without a trace."""

import pytest

from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import get_checkpoint, list_unremoved
from domain.db import Database
from domain.errors import CheckpointExpired, CheckpointNotFound
from domain.jobs.actions import JobIsNeeded, delete_job
from domain.jobs.checkpoint_deletion import (
    CheckpointIsNeeded,
    CheckpointIsPinned,
    delete_checkpoint,
    discard_surplus,
    pin_checkpoint,
)
from domain.jobs.event_recorder import add_artifact
from domain.jobs.leases import Claim
from domain.jobs.repository import list_events
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.jobs.usage import storage_bytes
from tests.support.rows import SPEC, claim_job, insert_dataset, reload_job, save_checkpoint, set_status
from tests.support.worker_actions import settle_attempt


@pytest.fixture
def claim(database: Database) -> Claim:
    return claim_job(database)


@pytest.fixture
def state(database: Database, claim: Claim) -> Checkpoint:
    """A training state at the end of a stage."""
    return save_checkpoint(database, claim, "stage", 10, size_bytes=100)


def delete(database: Database, checkpoint: Checkpoint) -> str:
    with database.transaction(write=True) as session:
        return delete_checkpoint(session, "default", checkpoint.id)


def set_pinned(database: Database, checkpoint: Checkpoint, pinned: bool) -> None:
    with database.transaction(write=True) as session:
        pin_checkpoint(session, "default", checkpoint.id, pinned=pinned)


def test_a_state_of_a_live_job_is_needed_by_that_job_and_a_student_is_not(
    database: Database, claim: Claim, state: Checkpoint
) -> None:
    best = save_checkpoint(database, claim, "best", 10)
    assert delete(database, best) == best.store_key
    with pytest.raises(CheckpointIsNeeded, match=f"The job {claim.job_id} has not ended and would resume"):
        delete(database, state)
    settle_attempt(database, claim, AttemptOutcome.succeeded())
    assert delete(database, state) == state.store_key


def test_a_deleted_checkpoint_leaves_a_tombstone_an_event_and_its_bytes_free(
    database: Database, claim: Claim, state: Checkpoint
) -> None:
    save_checkpoint(database, claim, "final", 20, size_bytes=7)
    settle_attempt(database, claim, AttemptOutcome.succeeded())
    version = reload_job(database, claim).version
    delete(database, state)
    with database.transaction(write=False) as session:
        assert list_unremoved(session, limit=9) == {state.id: state.store_key}
        event = list_events(session, claim.job_id, limit=99).rows[-1]
    assert (event.type, event.data["id"], event.data["reason"]) == ("checkpoint_deleted", state.id, "requested")
    job = reload_job(database, claim)
    assert (job.stored_bytes, job.version > version) == (7, True)
    with pytest.raises(CheckpointExpired):
        delete(database, state)


def test_the_bytes_of_a_project_are_those_of_its_jobs_and_data_sets(database: Database, claim: Claim) -> None:
    theirs = claim_job(database, project="theirs")
    save_checkpoint(database, theirs, "final", 20, size_bytes=2**40)
    save_checkpoint(database, claim, "final", 20, size_bytes=2**40)
    with database.transaction(write=True) as session:
        for size in (30, 40):
            # The newer file takes the place of the older.
            add_artifact(session, claim, kind="report", store_key=f"r{size}", size_bytes=size, sha256="0" * 64)
        assert insert_dataset(session).size_bytes == 1000
        assert [storage_bytes(session, project)[project] for project in ("default", "theirs", "none")] == [
            2**40 + 1040,
            2**40,
            0,
        ]
    assert reload_job(database, claim).stored_bytes == 2**40 + 40


def test_a_pinned_checkpoint_stays_and_so_does_its_job(database: Database, claim: Claim, state: Checkpoint) -> None:
    settle_attempt(database, claim, AttemptOutcome.succeeded())
    for _ in range(2):
        set_pinned(database, state, True)
    with pytest.raises(CheckpointIsPinned):
        delete(database, state)
    with pytest.raises(JobIsNeeded, match="is pinned"), database.transaction(write=True) as session:
        delete_job(session, "default", claim.job_id)
    set_pinned(database, state, False)
    delete(database, state)
    with pytest.raises(CheckpointExpired):
        set_pinned(database, state, True)


@pytest.mark.parametrize("role", ["teacher", "student", "start", "start of an ended job"])
def test_a_checkpoint_that_another_job_needs_stays_and_the_job_is_named(
    database: Database, claim: Claim, state: Checkpoint, role: str
) -> None:
    settle_attempt(database, claim, AttemptOutcome.succeeded())
    if role in ("teacher", "student"):
        other = claim_job(database, posted_spec={**SPEC, role: {"checkpoint": state.id}})
    else:
        other = claim_job(database, starts_from=state.id, retry_of=claim.job_id)
    if role == "start of an ended job":
        with database.transaction(write=True) as session:
            set_status(session, other.job_id, JobStatus.CANCELLED)
    with pytest.raises(CheckpointIsNeeded, match=other.job_id):
        delete(database, state)
    if role != "start of an ended job":
        with pytest.raises(JobIsNeeded, match=other.job_id), database.transaction(write=True) as session:
            delete_job(session, "default", claim.job_id)


def test_a_deleted_job_leaves_tombstones_of_its_checkpoints(
    database: Database, claim: Claim, state: Checkpoint
) -> None:
    settle_attempt(database, claim, AttemptOutcome.succeeded())
    with database.transaction(write=True) as session:
        delete_job(session, "default", claim.job_id)
    with pytest.raises(CheckpointExpired, match="deleted with its job"), database.transaction(write=False) as session:
        get_checkpoint(session, "default", state.id)


def test_surplus_that_is_pinned_or_that_another_job_needs_stays(database: Database, claim: Claim) -> None:
    first, used, pinned, newest = (save_checkpoint(database, claim, "training", step) for step in (1, 2, 3, 4))
    claim_job(database, starts_from=used.id)
    set_pinned(database, pinned, True)
    with database.transaction(write=True) as session:
        assert discard_surplus(session, claim.job_id, token=claim.token, keep_states=1) == [first.store_key]
        for kept in (used, pinned, newest):
            assert get_checkpoint(session, "default", kept.id).id == kept.id
    assert reload_job(database, claim).stored_bytes == 3


def test_another_projects_checkpoint_can_be_neither_deleted_nor_pinned(database: Database) -> None:
    theirs = save_checkpoint(database, claim_job(database, project="theirs"), "best", 3)
    with pytest.raises(CheckpointNotFound):
        delete(database, theirs)
    with pytest.raises(CheckpointNotFound):
        set_pinned(database, theirs, True)
