"""The collector of what has expired: rows and files end together, whenever it is killed."""

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.checkpoints.models import Checkpoint
from domain.datasets.models import Dataset
from domain.db import db_now
from domain.jobs.checkpoint_deletion import pin_checkpoint
from domain.jobs.models import Job
from domain.jobs.states import AttemptOutcome
from domain.retention.models import RetentionPolicy
from domain.retention.repository import set_policy
from pocl.storage.manifest import write_manifest
from tests.support.harness import PROJECT, ServiceHarness
from tests.support.rows import save_checkpoint
from tests.support.worker_actions import claim_queued_job, settle_attempt
from tests.worker.test_garbage import DyingStore, Killed
from worker.expiry import ExpiryCollector
from worker.garbage import remove_deleted_checkpoints

POLICY = RetentionPolicy(checkpoint_days=1, job_days=3, dataset_days=2)


@pytest.fixture
def jobs(harness: ServiceHarness, tmp_path: Path) -> list[str]:
    """Jobs that ended 4, 2 and 0 days ago, each with a data set, two states and a student; one state is pinned."""
    (tmp_path / "model").mkdir()
    write_manifest(tmp_path / "model")
    ids = []
    for days in (4, 2, 0):
        ids.append(harness.submit())
        claim = claim_queued_job(harness.database)
        rows = [save_checkpoint(harness.database, claim, "stage", step) for step in (1, 2)]
        for row in (*rows, save_checkpoint(harness.database, claim, "final", 2)):
            harness.store.publish(tmp_path / "model", row.store_key)
        settle_attempt(harness.database, claim, AttemptOutcome.succeeded())
        with harness.database.transaction(write=True) as session:
            session.execute(sa.update(Job).where(Job.id == ids[-1]).values(finished_at=db_now(-86_400 * days - 60)))
            session.execute(sa.update(Dataset).values(created_at=db_now(-86_400 * 9)))
            if days == 2:
                pin_checkpoint(session, PROJECT, rows[0].id, pinned=True)
    with harness.database.transaction(write=True) as session:
        set_policy(session, PROJECT, POLICY)
    return ids


def rows_and_files(harness: ServiceHarness) -> tuple[set[str], set[str]]:
    """The store keys of all checkpoints and data sets that rows name, and those of the files that are there."""
    with harness.database.transaction(write=False) as session:
        checkpoints, datasets = sa.select(Checkpoint.store_key), sa.select(Dataset.store_key)
        rows = set(session.scalars(checkpoints)) | set(session.scalars(datasets))
    files = set(harness.store.list_keys("datasets"))
    for job in harness.store.list_keys("jobs"):
        files.update(*(harness.store.list_keys(attempt) for attempt in harness.store.list_keys(job)))
    return rows, files


def test_what_has_expired_goes_with_its_files_and_the_rest_stays(harness: ServiceHarness, jobs: list[str]) -> None:
    collector = ExpiryCollector(harness.database, harness.store, "one")
    # The first job, two states of the others, and the data sets of the first two.
    assert collector.turn() == 1 + 1 + 2
    remove_deleted_checkpoints(harness.database, harness.store)
    rows, files = rows_and_files(harness)
    assert rows == files
    assert sorted(key.rpartition("/")[2] for key in rows if key.startswith("jobs/")) == [
        "final-00000002", "final-00000002", "stage-00000001", "stage-00000001", "stage-00000002",
    ]  # fmt: skip
    assert {each.id for each in map(harness.job, jobs[1:])} == set(jobs[1:])
    assert [len(harness.checkpoints(job)) for job in jobs[1:]] == [2, 3]
    assert collector.turn() == 0


def test_a_collector_killed_between_any_two_steps_leaves_nothing_dangling(
    harness: ServiceHarness, jobs: list[str]
) -> None:
    del jobs
    for removals in range(6):
        store = DyingStore(harness.settings.artifact_root, 0, after=removals % 2 == 0)
        try:
            ExpiryCollector(harness.database, store, "dying").turn()
            remove_deleted_checkpoints(harness.database, store)
        except Killed:
            pass
        rows, files = rows_and_files(harness)
        # A row without its files would be a checkpoint that cannot be loaded; files without a row are found later.
        assert rows <= files
    collector = ExpiryCollector(harness.database, harness.store, "dying")
    while collector.turn() + remove_deleted_checkpoints(harness.database, harness.store):
        pass
    rows, files = rows_and_files(harness)
    unnamed_jobs = {key for key in files - rows if key.startswith("jobs/")}
    # What is left belongs to a job or a data set without a row: the sweep of the store takes those.
    with harness.database.transaction(write=False) as session:
        known = set(session.scalars(sa.select(Job.id)))
    assert not {key.split("/")[1] for key in unnamed_jobs} & known


def test_two_schedulers_do_not_collect_at_once(harness: ServiceHarness, jobs: list[str]) -> None:
    del jobs
    first, second = (ExpiryCollector(harness.database, harness.store, name) for name in ("one", "two"))
    with harness.database.transaction(write=True) as session:
        set_policy(session, PROJECT, RetentionPolicy())
    assert first.turn() == 0
    with harness.database.transaction(write=True) as session:
        set_policy(session, PROJECT, POLICY)
    assert second.turn() == 0
    assert first.turn() == 4


def test_a_turn_is_bounded_and_the_next_goes_on(harness: ServiceHarness, jobs: list[str]) -> None:
    del jobs
    with harness.database.transaction(write=True) as session:
        set_policy(session, PROJECT, replace(POLICY, dataset_days=None))
    # Time passes at each look at the clock: a turn gets through one job.
    ticks = iter(range(0, 10_000, 9))
    collector = ExpiryCollector(harness.database, harness.store, "one", clock=lambda: float(next(ticks)))
    turns = [collector.turn() for _ in range(6)]
    assert (sum(turns), max(turns)) == (2, 1)
