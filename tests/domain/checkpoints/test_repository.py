"""Queries for checkpoints."""

from typing import Any

import pytest
import sqlalchemy as sa

from domain.checkpoints.models import Checkpoint, CheckpointTombstone
from domain.checkpoints.repository import (
    TOMBSTONE_SECONDS,
    delete_old_tombstones,
    get_checkpoint,
    has_tombstone,
    list_checkpoints,
    list_unremoved,
    lock_surplus,
    record_removed,
    replace_by_tombstones,
)
from domain.db import Database, db_now
from domain.errors import CheckpointExpired, CheckpointNotFound
from tests.support.rows import claim_job, save_checkpoint


def test_a_checkpoint_belongs_to_the_project_of_its_job(database: Database) -> None:
    checkpoint = save_checkpoint(database, claim_job(database, project="theirs"), "final", 9)
    with database.transaction(write=False) as session:
        assert get_checkpoint(session, "theirs", checkpoint.id).step == 9
        assert list(list_checkpoints(session, "default", limit=9).rows) == []
        with pytest.raises(CheckpointNotFound):
            get_checkpoint(session, "default", checkpoint.id)


def test_lists_are_newest_first_in_pages_and_filtered(database: Database) -> None:
    one, other = claim_job(database), claim_job(database)
    training = [save_checkpoint(database, one, "training", step, stage=0).id for step in (1, 2, 3)]
    best = save_checkpoint(database, one, "best", 2, stage=1).id
    theirs = save_checkpoint(database, other, "training", 9, stage=1).id
    with database.transaction(write=True) as session:
        get_checkpoint(session, "default", training[0]).pinned = True

    def ids(**filters: Any) -> list[str]:
        with database.transaction(write=False) as session:
            return [row.id for row in list_checkpoints(session, "default", limit=9, **filters).rows]

    with database.transaction(write=False) as session:
        page = list_checkpoints(session, "default", limit=2, job_id=one.job_id, kinds=["training"])
        last = page.rows[-1].id
        rest = list_checkpoints(session, "default", limit=2, job_id=one.job_id, kinds=["training"], after=last)
        assert [row.id for row in (*page.rows, *rest.rows)] == training[::-1]
        assert (page.has_more, rest.has_more) == (True, False)
    assert ids() == [theirs, best, *training[::-1]]
    assert ids(job_id=one.job_id) == [best, *training[::-1]]
    assert ids(stage=1) == [theirs, best]
    assert ids(kinds=["best", "final"]) == [best]
    assert ids(pinned=True) == training[:1]
    assert ids(pinned=False) == [theirs, best, *training[:0:-1]]


def kept_after_surplus(database: Database, job_id: str, *, keep_states: int) -> set[tuple[str, int]]:
    with database.transaction(write=True) as session:
        replace_by_tombstones(session, lock_surplus(session, job_id, keep_states=keep_states), "surplus")
        return {(row.kind, row.step) for row in list_checkpoints(session, "default", limit=99).rows}


def test_training_states_beyond_the_newest_and_earlier_best_students_are_surplus(database: Database) -> None:
    claim = claim_job(database)
    states = {step: save_checkpoint(database, claim, "training", step) for step in (1, 2, 3, 4)}
    for step in (2, 4, 3):
        # An attempt that resumed from an earlier step announced the last one.
        save_checkpoint(database, claim, "best", step)
    rest = {("stage", 2), ("final", 4)}
    for kind, step in rest:
        save_checkpoint(database, claim, kind, step)  # type: ignore[arg-type] # Literals.
    with database.transaction(write=True) as session:
        get_checkpoint(session, "default", states[1].id).pinned = True
    kept = rest | {("best", 3), ("training", 1)}
    assert kept_after_surplus(database, claim.job_id, keep_states=2) == kept | {("training", 3), ("training", 4)}
    # With the student stored: but a state after the end of the last stage is the newest there is.
    assert kept_after_surplus(database, claim.job_id, keep_states=0) == kept | {("training", 3), ("training", 4)}
    save_checkpoint(database, claim, "stage", 4)
    assert kept_after_surplus(database, claim.job_id, keep_states=0) == kept | {("stage", 4)}


def test_a_deleted_checkpoint_is_gone_and_another_projects_was_never_there(database: Database) -> None:
    claim = claim_job(database, project="theirs")
    checkpoint = save_checkpoint(database, claim, "best", 3)
    with database.transaction(write=True) as session:
        replace_by_tombstones(session, [get_checkpoint(session, "theirs", checkpoint.id)], "requested")
    with database.transaction(write=False) as session:
        with pytest.raises(CheckpointExpired, match="A client deleted the checkpoint at 20"):
            get_checkpoint(session, "theirs", checkpoint.id)
        with pytest.raises(CheckpointNotFound) as raised:
            get_checkpoint(session, "default", checkpoint.id)
        assert raised.value.status == 404
        assert has_tombstone(session, checkpoint.store_key)


def test_a_tombstone_stays_until_its_files_are_removed_and_it_is_old(database: Database) -> None:
    claim = claim_job(database)
    saved: list[Checkpoint] = [save_checkpoint(database, claim, "stage", step) for step in (1, 2, 3)]
    with database.transaction(write=True) as session:
        replace_by_tombstones(session, [session.merge(each) for each in saved], "expired")
        first, *others = (each.id for each in saved)
        assert list(list_unremoved(session, limit=9)) == [first, *others]
        record_removed(session, others)
        assert list_unremoved(session, limit=9) == {first: saved[0].store_key}
        old = sa.update(CheckpointTombstone).where(CheckpointTombstone.id != others[0])
        session.execute(old.values(deleted_at=db_now(-TOMBSTONE_SECONDS - 1)))
        assert delete_old_tombstones(session, limit=9) == 1
        assert set(session.scalars(sa.select(CheckpointTombstone.id))) == {first, others[0]}
