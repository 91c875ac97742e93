"""Queries for checkpoints."""

import pytest

from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import (
    delete_checkpoint,
    get_checkpoint,
    list_checkpoints,
    surplus_training_states,
)
from domain.db import Database
from domain.errors import CheckpointNotFound
from domain.jobs.event_recorder import add_checkpoint
from domain.jobs.leases import Claim
from pocl.events import CheckpointKind
from tests.support.rows import claim_job


def publish(database: Database, claim: Claim, kind: CheckpointKind, step: int) -> Checkpoint:
    with database.transaction(write=True) as session:
        return add_checkpoint(
            session,
            claim,
            kind=kind,
            step=step,
            stage=None,
            store_key=f"jobs/{claim.job_id}/{kind}-{step}",
            size_bytes=1,
            manifest_sha256="0" * 64,
        )


def test_a_checkpoint_belongs_to_the_project_of_its_job(database: Database) -> None:
    checkpoint = publish(database, claim_job(database, project="theirs"), "final", 9)
    with database.transaction(write=False) as session:
        assert get_checkpoint(session, "theirs", checkpoint.id).step == 9
        assert list(list_checkpoints(session, "default", limit=9).rows) == []
        with pytest.raises(CheckpointNotFound):
            get_checkpoint(session, "default", checkpoint.id)


def test_lists_are_newest_first_in_pages_and_filtered(database: Database) -> None:
    one, other = claim_job(database), claim_job(database)
    training = [publish(database, one, "training", step) for step in (1, 2, 3)]
    best = publish(database, one, "best", 2)
    publish(database, other, "training", 9)
    with database.transaction(write=False) as session:
        page = list_checkpoints(session, "default", limit=2, job_id=one.job_id, kind="training")
        rest = list_checkpoints(session, "default", limit=2, job_id=one.job_id, kind="training", after=page.rows[-1].id)
        assert [row.id for row in (*page.rows, *rest.rows)] == [row.id for row in reversed(training)]
        assert (page.has_more, rest.has_more) == (True, False)
        assert list_checkpoints(session, "default", limit=9, job_id=one.job_id).rows[0].id == best.id


def test_only_training_states_beyond_the_newest_are_surplus(database: Database) -> None:
    claim = claim_job(database)
    for step in (1, 2, 3, 4):
        publish(database, claim, "training", step)
    for kind in ("stage", "best", "final"):
        publish(database, claim, kind, 1)
    with database.transaction(write=True) as session:
        for checkpoint in surplus_training_states(session, claim.job_id, keep=2):
            delete_checkpoint(session, checkpoint)
        remaining = {(row.kind, row.step) for row in list_checkpoints(session, "default", limit=99).rows}
    assert remaining == {("training", 3), ("training", 4), ("stage", 1), ("best", 1), ("final", 1)}
