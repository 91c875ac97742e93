"""Removal of files whose rows are gone: what a killed process leaves is removed in the end, and nothing else."""

from pathlib import Path

import pytest

from domain.artifacts import ArtifactStore
from domain.checkpoints.repository import list_unremoved
from domain.jobs.checkpoint_deletion import delete_checkpoint
from pocl.storage.manifest import write_manifest
from tests.support.harness import PROJECT, ServiceHarness
from tests.support.rows import save_checkpoint
from tests.support.worker_actions import claim_queued_job
from worker.garbage import remove_deleted_checkpoints, remove_unnamed_checkpoints


class Killed(BaseException):
    """The end of the process: nothing handles it."""


class DyingStore(ArtifactStore):
    """A store whose process is killed before or after so many removals."""

    def __init__(self, root: Path, removals: int, *, after: bool) -> None:
        super().__init__(root)
        self._left = iter(range(removals))
        self._after = after

    def remove(self, key: str) -> None:
        dies = next(self._left, None) is None
        if dies and not self._after:
            raise Killed
        super().remove(key)
        if dies:
            raise Killed


@pytest.fixture
def checkpoints(harness: ServiceHarness, tmp_path: Path) -> dict[str, str]:
    """The store keys of three stored checkpoints, by id; the rows of the first two are deleted."""
    (tmp_path / "model").mkdir()
    write_manifest(tmp_path / "model")
    harness.submit()
    claim = claim_queued_job(harness.database)
    stored: dict[str, str] = {}
    for step in (1, 2, 3):
        row = save_checkpoint(harness.database, claim, "final", step)
        harness.store.publish(tmp_path / "model", row.store_key)
        stored[row.id] = row.store_key
    for checkpoint_id in list(stored)[:2]:
        with harness.database.transaction(write=True) as session:
            delete_checkpoint(session, PROJECT, checkpoint_id)
    return stored


def stored_keys(harness: ServiceHarness, checkpoints: dict[str, str]) -> set[str]:
    directory = next(iter(checkpoints.values())).rpartition("/")[0]
    return set(harness.store.list_keys(directory))


def test_a_collector_killed_at_any_step_leaves_nothing_behind_for_good(
    harness: ServiceHarness, checkpoints: dict[str, str]
) -> None:
    *_, kept = checkpoints.values()
    # What the process of the client's request had removed before it was killed counts as removed.
    harness.store.remove(next(iter(checkpoints.values())))
    for removals, after in ((0, False), (0, True), (1, False), (1, True)):
        with pytest.raises(Killed):
            remove_deleted_checkpoints(
                harness.database, DyingStore(harness.settings.artifact_root, removals, after=after)
            )
        with harness.database.transaction(write=False) as session:
            # Until files are known to be removed, a tombstone names them.
            assert len(list_unremoved(session, limit=9)) == 2
        assert kept in stored_keys(harness, checkpoints)
    assert remove_deleted_checkpoints(harness.database, harness.store) == 2
    assert stored_keys(harness, checkpoints) == {kept}
    assert remove_deleted_checkpoints(harness.database, harness.store) == 0


def test_checkpoints_of_an_ended_job_that_no_row_names_are_removed(
    harness: ServiceHarness, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    *_, kept = checkpoints.values()
    directory = kept.rpartition("/")[0]
    job = directory.split("/")[1]
    harness.store.publish(tmp_path / "model", f"jobs/{job}/attempt-2/training-00000007")
    (tmp_path / "log").write_text("of another kind")
    harness.store.publish_file(tmp_path / "log", f"{directory}/result.json")
    assert remove_unnamed_checkpoints(harness.database, harness.store, job) == 3
    assert stored_keys(harness, checkpoints) == {kept, f"{directory}/result.json"}
    assert remove_unnamed_checkpoints(harness.database, harness.store, job) == 0
