"""The rows of exports: one of a checkpoint and format, leased, retried, counted, and what they keep from deletion."""

import pytest
import sqlalchemy as sa

from domain.checkpoints.models import Checkpoint, CheckpointTombstone
from domain.db import Database, db_now
from domain.errors import LostLease, QuotaExceeded
from domain.exports.models import MAX_ATTEMPTS, CheckpointExport
from domain.exports.repository import ExportNotFound
from domain.jobs.actions import JobIsNeeded, delete_job
from domain.jobs.checkpoint_deletion import CheckpointIsNeeded, delete_checkpoint, discard_surplus
from domain.jobs.expiry import delete_expired_checkpoints, delete_expired_job
from domain.jobs.export_feed import (
    DueExport,
    ExportFailure,
    claim_export,
    give_up_exports,
    record_exported,
    record_failed_export,
    release_export,
    renew_export,
)
from domain.jobs.export_requests import ExportRequest, delete_export, request_export
from domain.jobs.leases import Claim
from domain.jobs.usage import storage_bytes
from domain.projects.models import Project
from domain.retention.models import RetentionPolicy
from domain.settings import Settings
from pocl.spec import GgufFormat
from tests.support.rows import claim_job, reload_job, save_checkpoint
from tests.support.worker_actions import succeed_job

FULL = ExportFailure("disk_full", "There is no space left.", "capacity")
ALL_EXPIRES = RetentionPolicy(checkpoint_days=0, keep_last=0, keep_best=False, job_days=0)
SETTINGS = Settings(home="/nowhere", max_exports_queued=2)


@pytest.fixture
def claim(database: Database) -> Claim:
    """The claim by which a job was run that has succeeded."""
    claim = claim_job(database)
    save_checkpoint(database, claim, "final", 20, size_bytes=1000)
    succeed_job(database, claim)
    return claim


def checkpoint_of(database: Database, claim: Claim) -> str:
    with database.transaction(write=False) as session:
        return session.scalars(sa.select(Checkpoint.id).where(Checkpoint.job_id == claim.job_id)).one()


def ask(database: Database, claim: Claim, export_format: GgufFormat = "q8_0", **settings: object) -> ExportRequest:
    checkpoint = checkpoint_of(database, claim)
    with database.transaction(write=True) as session:
        changed = SETTINGS.model_copy(update=settings)
        return request_export(session, changed, claim.project, checkpoint, export_format)


def take(database: Database, *, lease_seconds: float = 60) -> DueExport:
    with database.transaction(write=True) as session:
        due = claim_export(session, lease_seconds=lease_seconds)
    assert due is not None
    return due


def nothing_is_due(database: Database) -> bool:
    with database.transaction(write=True) as session:
        return claim_export(session, lease_seconds=60) is None


def complete(database: Database, due: DueExport, size_bytes: int = 500) -> None:
    with database.transaction(write=True) as session:
        record_exported(session, due, size_bytes=size_bytes, manifest_sha256="a" * 64, notes=["A note."])


def fail(database: Database, due: DueExport, *, wait_seconds: float | None) -> bool:
    with database.transaction(write=True) as session:
        return record_failed_export(session, due, FULL, wait_seconds=wait_seconds)


def row_of(database: Database, export_id: str) -> CheckpointExport | None:
    with database.transaction(write=False) as session:
        return session.get(CheckpointExport, export_id)


def state_of(database: Database, export_id: str) -> str | None:
    row = row_of(database, export_id)
    return None if row is None else row.state


def set_columns(database: Database, **values: object) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.update(CheckpointExport).values(**values))


def test_a_checkpoint_has_one_export_of_each_format(database: Database, claim: Claim) -> None:
    first = ask(database, claim)
    assert first.changed
    again = ask(database, claim)
    assert (again.changed, again.export.id) == (False, first.export.id)
    assert ask(database, claim, "f16").export.id != first.export.id
    due = take(database)
    assert due.export_id == first.export.id
    assert not ask(database, claim).changed
    complete(database, due)
    again = ask(database, claim)
    assert (again.changed, again.export.state, again.export.notes) == (False, "complete", ["A note."])


def test_a_project_has_no_more_under_way_than_it_may_and_what_is_there_is_answered(
    database: Database, claim: Claim
) -> None:
    first = ask(database, claim, "f32")
    ask(database, claim, "f16")
    with pytest.raises(QuotaExceeded, match="2 exports"):
        ask(database, claim, "q8_0")
    assert not ask(database, claim, "f32").changed
    complete(database, take(database))
    assert state_of(database, first.export.id) == "complete"
    assert ask(database, claim, "q8_0").changed


def test_bytes_count_for_project_and_job_and_hold_its_quota(database: Database, claim: Claim) -> None:
    before = reload_job(database, claim).stored_bytes
    export = ask(database, claim).export
    complete(database, take(database), 500)
    assert reload_job(database, claim).stored_bytes == before + 500
    with database.transaction(write=False) as session:
        assert storage_bytes(session)[claim.project] == 1500
    with database.transaction(write=True) as session:
        session.execute(sa.update(Project).where(Project.id == claim.project).values(max_storage_bytes=1600))
    ask(database, claim, "f16")
    due = take(database)
    with pytest.raises(QuotaExceeded):
        complete(database, due, 500)
    complete(database, due, 100)
    with pytest.raises(QuotaExceeded):
        ask(database, claim, "f32")
    with database.transaction(write=True) as session:
        delete_export(session, claim.project, export.checkpoint_id, export.id)
    assert reload_job(database, claim).stored_bytes == before + 100


def test_one_worker_at_a_time_holds_it_and_a_late_one_writes_nothing(database: Database, claim: Claim) -> None:
    export = ask(database, claim).export
    first = take(database, lease_seconds=-1)
    second = take(database)
    assert second.lease_token > first.lease_token
    assert second.store_key != first.store_key
    assert nothing_is_due(database)
    with database.transaction(write=True) as session:
        renew_export(session, second, lease_seconds=60)
    for late in (
        lambda session: renew_export(session, first, lease_seconds=60),
        lambda session: record_exported(session, first, size_bytes=1, manifest_sha256="0" * 64, notes=[]),
        lambda session: record_failed_export(session, first, FULL, wait_seconds=None),
        lambda session: release_export(session, first),
    ):
        with pytest.raises(LostLease), database.transaction(write=True) as session:
            late(session)
    assert state_of(database, export.id) == "running"
    complete(database, second)
    row = row_of(database, export.id)
    assert row is not None
    assert (row.state, row.store_key, row.error) == ("complete", second.store_key, None)


def test_it_is_tried_again_a_bounded_number_of_times_and_then_asked_for_again(database: Database, claim: Claim) -> None:
    export = ask(database, claim).export
    assert not fail(database, take(database), wait_seconds=3600)
    assert nothing_is_due(database)
    for attempt in range(2, MAX_ATTEMPTS + 1):
        set_columns(database, not_before=db_now(-1))
        assert fail(database, take(database), wait_seconds=0) is (attempt == MAX_ATTEMPTS)
    row = row_of(database, export.id)
    assert row is not None
    assert (row.state, row.error) == ("failed", FULL.as_json())
    again = ask(database, claim)
    assert (again.changed, again.export.id, again.export.attempts) == (True, export.id, 0)
    complete(database, take(database))


def test_what_ends_every_worker_that_tries_is_given_up(database: Database, claim: Claim) -> None:
    export = ask(database, claim).export
    for _ in range(MAX_ATTEMPTS):
        take(database, lease_seconds=-1)
    assert nothing_is_due(database)
    row = row_of(database, export.id)
    assert row is not None
    assert (row.state, row.error and row.error["code"]) == ("failed", "export_broken_off")


def test_the_end_of_a_worker_costs_no_attempt(database: Database, claim: Claim) -> None:
    ask(database, claim)
    due = take(database)
    with database.transaction(write=True) as session:
        release_export(session, due)
    assert take(database).attempts == 1


def test_nothing_deletes_the_checkpoint_while_it_is_exported(database: Database, claim: Claim) -> None:
    export = ask(database, claim).export
    for _ in ("pending", "running"):
        with database.transaction(write=True) as session, pytest.raises(CheckpointIsNeeded, match="exported"):
            delete_checkpoint(session, claim.project, export.checkpoint_id)
        with database.transaction(write=True) as session, pytest.raises(JobIsNeeded, match="exported"):
            delete_job(session, claim.project, claim.job_id)
        with database.transaction(write=True) as session:
            assert delete_expired_checkpoints(session, claim.job_id, ALL_EXPIRES) == 0
            assert delete_expired_job(session, claim.job_id, ALL_EXPIRES) is None
        due = take(database, lease_seconds=-1)
    complete(database, due)
    with database.transaction(write=True) as session:
        assert delete_expired_checkpoints(session, claim.job_id, ALL_EXPIRES) == 1
    assert row_of(database, export.id) is None
    assert reload_job(database, claim).stored_bytes == 0


def test_a_best_student_that_another_replaces_stays_until_it_is_exported(database: Database) -> None:
    claim = claim_job(database)
    best = save_checkpoint(database, claim, "best", 10)
    ask(database, claim)
    save_checkpoint(database, claim, "best", 20)

    def discard() -> list[str]:
        with database.transaction(write=True) as session:
            return discard_surplus(session, claim.job_id, token=claim.token, keep_states=1)

    assert discard() == []
    complete(database, take(database))
    assert discard() == [best.store_key]


def test_what_nobody_exports_in_time_keeps_no_files_for_ever(database: Database, claim: Claim) -> None:
    export = ask(database, claim).export
    with database.transaction(write=True) as session:
        assert give_up_exports(session) == 0
    set_columns(database, expires_at=db_now(-1))
    with database.transaction(write=True) as session:
        assert give_up_exports(session) == 1
    row = row_of(database, export.id)
    assert row is not None
    assert (row.state, row.error and row.error["code"]) == ("failed", "not_exported_in_time")


def test_a_deleted_export_is_lost_to_its_worker_and_its_files_are_found_by_garbage_collection(
    database: Database, claim: Claim
) -> None:
    export = ask(database, claim).export
    due = take(database)
    with database.transaction(write=True) as session:
        assert delete_export(session, claim.project, export.checkpoint_id, export.id) is None
    with pytest.raises(LostLease):
        complete(database, due)
    export = ask(database, claim).export
    due = take(database)
    complete(database, due)
    with database.transaction(write=True) as session:
        assert delete_export(session, claim.project, export.checkpoint_id, export.id) == due.store_key
    with database.transaction(write=True) as session, pytest.raises(ExportNotFound):
        delete_export(session, claim.project, export.checkpoint_id, export.id)
    with database.transaction(write=False) as session:
        left = session.get_one(CheckpointTombstone, export.id)
    assert (left.store_key, left.files_removed) == (due.store_key, False)
