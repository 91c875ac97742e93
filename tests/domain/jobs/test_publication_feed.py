"""The rows of publications: made with the success of a job, leased, retried, and what they keep from being deleted."""

import pytest
import sqlalchemy as sa

from domain.checkpoints.models import Checkpoint
from domain.db import Database, db_now
from domain.errors import LostLease
from domain.jobs.actions import JobIsNeeded, delete_job
from domain.jobs.checkpoint_deletion import CheckpointIsNeeded, delete_checkpoint
from domain.jobs.expiry import delete_expired_checkpoints, delete_expired_job
from domain.jobs.leases import Claim
from domain.jobs.models import Job
from domain.jobs.publication_feed import (
    AlreadyPublished,
    DuePublication,
    PublicationNotFound,
    PublishedCheckpointDeleted,
    claim_publication,
    give_up_publications,
    record_failed_push,
    record_published,
    release_publication,
    renew_publication,
    retry_publication,
)
from domain.jobs.states import AttemptOutcome, EndReason
from domain.publications.models import Publication
from domain.retention.models import RetentionPolicy
from tests.support.rows import SPEC, claim_job, reload_job, save_checkpoint
from tests.support.worker_actions import settle_attempt, succeed_job

DIVERGED = EndReason("training_diverged", "The loss is no number.", "user", False, "Lower the learning rate.")
ALL_EXPIRES = RetentionPolicy(checkpoint_days=0, keep_last=0, keep_best=False, job_days=0)


def claim_with_push(database: Database, **push: object) -> Claim:
    """A claimed job whose student is to be pushed."""
    return claim_job(database, posted_spec={**SPEC, "export": {"hub": {"repo": "acme/student", **push}}})


def succeeded(database: Database) -> Claim:
    """A job that has succeeded, and whose student is to be pushed."""
    claim = claim_with_push(database)
    save_checkpoint(database, claim, "final", 20)
    succeed_job(database, claim)
    return claim


def row_of(database: Database, claim: Claim) -> Publication | None:
    with database.transaction(write=False) as session:
        return session.get(Publication, claim.job_id)


def claim_due(database: Database, *, lease_seconds: float = 60) -> DuePublication | None:
    with database.transaction(write=True) as session:
        return claim_publication(session, lease_seconds=lease_seconds)


def fail(database: Database, due: DuePublication, *, wait_seconds: float | None) -> bool:
    with database.transaction(write=True) as session:
        return record_failed_push(session, due, "hub_busy", "The Hub answered 503.", wait_seconds=wait_seconds)


def set_columns(database: Database, **values: object) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.update(Publication).values(**values))


def test_a_publication_is_made_with_the_success_of_its_job_and_with_no_other_end(database: Database) -> None:
    claim = claim_with_push(database, branch="v1", private=False)
    student = save_checkpoint(database, claim, "final", 20)
    assert row_of(database, claim) is None
    succeed_job(database, claim)
    row = row_of(database, claim)
    assert row is not None
    assert (row.repo, row.branch, row.private) == ("acme/student", "v1", False)
    assert (row.state, row.checkpoint_id, row.store_key) == ("pending", student.id, student.store_key)
    other = claim_with_push(database)
    settle_attempt(database, other, AttemptOutcome.failed(DIVERGED))
    assert row_of(database, other) is None
    plain = claim_job(database)
    succeed_job(database, plain)
    assert row_of(database, plain) is None


def test_without_the_checkpoint_it_has_failed_from_the_beginning(database: Database) -> None:
    claim = claim_with_push(database)
    succeed_job(database, claim)
    row = row_of(database, claim)
    assert row is not None
    assert (row.state, row.error and row.error["code"]) == ("failed", "checkpoint_missing")
    with database.transaction(write=True) as session, pytest.raises(PublishedCheckpointDeleted):
        retry_publication(session, claim.project, claim.job_id)


def test_one_scheduler_at_a_time_holds_it_and_a_late_one_writes_nothing(database: Database) -> None:
    claim = succeeded(database)
    first = claim_due(database, lease_seconds=-1)
    assert first is not None
    second = claim_due(database)
    assert second is not None
    assert second.lease_token > first.lease_token
    assert claim_due(database) is None
    with database.transaction(write=True) as session:
        renew_publication(session, second, lease_seconds=60)
    before = row_of(database, claim)
    for late in (
        lambda session: renew_publication(session, first, lease_seconds=60),
        lambda session: record_published(session, first, commit="0" * 40, url="https://hub"),
        lambda session: record_failed_push(session, first, "c", "m", wait_seconds=None),
        lambda session: release_publication(session, first),
    ):
        with pytest.raises(LostLease), database.transaction(write=True) as session:
            late(session)
    after = row_of(database, claim)
    assert before is not None
    assert after is not None
    assert (after.state, after.lease_token) == (before.state, before.lease_token)


def test_every_change_raises_the_version_of_the_job_and_ends_are_events(database: Database) -> None:
    claim = succeeded(database)
    versions = [reload_job(database, claim).version]
    due = claim_due(database)
    assert due is not None
    versions.append(reload_job(database, claim).version)
    fail(database, due, wait_seconds=0)
    versions.append(reload_job(database, claim).version)
    due = claim_due(database)
    assert due is not None
    with database.transaction(write=True) as session:
        record_published(session, due, commit="a" * 40, url="https://hub/acme/student")
    versions.append(reload_job(database, claim).version)
    assert versions == sorted(set(versions))
    row = row_of(database, claim)
    assert row is not None
    assert (row.state, row.commit, row.error) == ("published", "a" * 40, None)
    assert claim_due(database) is None


def test_it_is_given_up_in_a_day_and_a_client_has_it_tried_again(database: Database) -> None:
    claim = succeeded(database)
    due = claim_due(database)
    assert due is not None
    assert not fail(database, due, wait_seconds=3600)
    assert claim_due(database) is None
    with database.transaction(write=True) as session:
        assert not retry_publication(session, claim.project, claim.job_id).changed
    set_columns(database, not_before=db_now(-1), expires_at=db_now(600))
    due = claim_due(database)
    assert due is not None
    assert fail(database, due, wait_seconds=3600)
    row = row_of(database, claim)
    assert row is not None
    assert row.error is not None
    assert (row.state, row.error["code"]) == ("failed", "hub_busy")
    assert "2 attempts" in row.error["message"]
    with database.transaction(write=True) as session:
        assert retry_publication(session, claim.project, claim.job_id).changed
    due = claim_due(database)
    assert due is not None
    assert due.attempts == 1
    with database.transaction(write=True) as session:
        record_published(session, due, commit="a" * 40, url="https://hub")
    with database.transaction(write=True) as session, pytest.raises(AlreadyPublished):
        retry_publication(session, claim.project, claim.job_id)


def test_a_job_that_pushes_nothing_has_none_to_retry(database: Database) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session, pytest.raises(PublicationNotFound):
        retry_publication(session, claim.project, claim.job_id)


def test_what_nobody_pushes_in_time_keeps_no_files_for_ever(database: Database) -> None:
    claim = succeeded(database)
    with database.transaction(write=True) as session:
        assert give_up_publications(session) == 0
    set_columns(database, expires_at=db_now(-7200))
    with database.transaction(write=True) as session:
        assert give_up_publications(session) == 1
    row = row_of(database, claim)
    assert row is not None
    assert (row.state, row.error and row.error["code"]) == ("failed", "not_pushed_in_time")


def test_attempts_that_are_always_broken_off_end_too(database: Database) -> None:
    claim = succeeded(database)
    assert claim_due(database, lease_seconds=-1) is not None
    set_columns(database, expires_at=db_now(-1))
    assert claim_due(database) is None
    row = row_of(database, claim)
    assert row is not None
    assert (row.state, row.error and row.error["code"]) == ("failed", "upload_broken_off")


@pytest.mark.parametrize("state", ["pending", "uploading"])
def test_nothing_deletes_the_files_that_are_still_to_be_pushed(database: Database, state: str) -> None:
    claim = succeeded(database)
    if state == "uploading":
        assert claim_due(database) is not None
    row = row_of(database, claim)
    assert row is not None
    assert row.checkpoint_id is not None
    with database.transaction(write=True) as session:
        assert delete_expired_checkpoints(session, claim.job_id, ALL_EXPIRES) == 0
        assert delete_expired_job(session, claim.job_id, ALL_EXPIRES) is None
        with pytest.raises(CheckpointIsNeeded):
            delete_checkpoint(session, claim.project, row.checkpoint_id)
        with pytest.raises(JobIsNeeded):
            delete_job(session, claim.project, claim.job_id)
    set_columns(database, state="failed")
    with database.transaction(write=True) as session:
        assert delete_expired_checkpoints(session, claim.job_id, ALL_EXPIRES) == 1
        assert session.scalars(sa.select(Checkpoint)).all() == []
        with pytest.raises(PublishedCheckpointDeleted):
            retry_publication(session, claim.project, claim.job_id)
        delete_job(session, claim.project, claim.job_id)
        assert session.scalars(sa.select(Job)).all() == []
    assert row_of(database, claim) is None
