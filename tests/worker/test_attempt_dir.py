"""Directories of attempts: locked while used, pruned afterwards, closed to paths that lead out."""

import os
from pathlib import Path

import pytest

from worker import attempt_dir
from worker.attempt_dir import AttemptDir


def test_locked_directory_is_not_pruned(tmp_path: Path) -> None:
    with attempt_dir.locked(tmp_path, "job_a", 1) as directory:
        (directory.workdir / "checkpoints").mkdir()
        attempt_dir.prune(tmp_path, keep=0)
        assert (directory.workdir / "checkpoints").is_dir()
        assert directory.temp_dir.is_dir()
    attempt_dir.prune(tmp_path, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_bulky_files_of_a_killed_worker_are_removed(tmp_path: Path) -> None:
    with attempt_dir.locked(tmp_path, "job_a", 1) as directory:
        pass
    (directory.workdir / "checkpoints").mkdir()
    (directory.workdir / "events.jsonl").touch()
    attempt_dir.prune(tmp_path, keep=5)
    assert [entry.name for entry in directory.workdir.iterdir()] == ["events.jsonl"]


def test_newest_directories_are_kept(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        with attempt_dir.locked(tmp_path, "job_a", attempt) as directory:
            pass
        os.utime(directory.path, (attempt, attempt))
    attempt_dir.prune(tmp_path, keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["job_a.2", "job_a.3"]


def test_abandoned_scratch_directory_is_removed_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / ".new-1").mkdir()
    attempt_dir.prune(tmp_path, keep=0)
    assert (tmp_path / ".new-1").exists()
    attempt_dir.prune(tmp_path, keep=0, now=lambda: (tmp_path / ".new-1").stat().st_mtime + 3601)
    assert not (tmp_path / ".new-1").exists()


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "link/passwd", "a/../../outside"])
def test_path_out_of_the_directory_is_refused(tmp_path: Path, path: str) -> None:
    directory = AttemptDir(tmp_path)
    directory.workdir.mkdir()
    (directory.workdir / "link").symlink_to("/etc")
    with pytest.raises(ValueError, match="leads out"):
        directory.locate(path)


def test_directory_is_private_to_its_owner(tmp_path: Path) -> None:
    with attempt_dir.locked(tmp_path, "job_a", 1) as directory:
        assert directory.path.stat().st_mode & 0o077 == 0
