"""The directory of an attempt: complete before the engine starts, locked while it runs, pruned afterwards.

WORK_ROOT/JOB.2/            the second attempt
    spec.json      the specification with ids localized to paths
    posted-spec.json  the specification with ids
    engine.log     what the engine wrote to stderr
    inputs/        data sets and models that were fetched from a bucket
    run/           the working directory of the run, see pocl/layout.py
    tmp/           temporary files of the engine
    .lock          locked by the supervisor
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.jobs.leases import StoredCheckpoint
from pocl.layout import (
    ABOUT_FILE,
    ANSWERS_FILE,
    COMPARED_DIR,
    PARTIAL_RANKING_FILE,
    RANKING_FILE,
    RANKING_INPUTS_FILE,
    checkpoint_dir,
)
from pocl.spec import DistillationSpec

_log = structlog.get_logger(__name__)

_LOCK_FILE = ".lock"
SCRATCH_PREFIX = ".new-"
"""How directories begin that :func:`prune` removes once they are old."""
_MAX_SCRATCH_AGE_SECONDS = 3600
# The engine takes a ranking only with its inputs, which vouch for it; each line of a partial one is sealed. Answers of
# evaluations that it makes again it drops.
_CARRIED_FILES = (RANKING_FILE, RANKING_INPUTS_FILE, PARTIAL_RANKING_FILE, ANSWERS_FILE)


@dataclass(frozen=True)
class AttemptDir:
    """The paths within the directory of an attempt."""

    path: Path

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.json"

    @property
    def posted_spec_file(self) -> Path:
        return self.path / "posted-spec.json"

    @property
    def log_file(self) -> Path:
        return self.path / "engine.log"

    @property
    def workdir(self) -> Path:
        return self.path / "run"

    @property
    def inputs_dir(self) -> Path:
        return self.path / "inputs"

    @property
    def temp_dir(self) -> Path:
        return self.path / "tmp"

    def locate(self, path: str) -> Path:
        """The absolute path of a file that the engine reported relative to its working directory.

        Raises:
            ValueError: the path leads out of the working directory.
        """
        absolute = self.workdir / path
        if not absolute.resolve().is_relative_to(self.workdir.resolve()):
            raise ValueError("a path of the engine leads out of its directory")
        return absolute


@contextmanager
def locked(root: Path, job_id: str, attempt: int) -> Iterator[AttemptDir]:
    """Create an empty directory for an attempt, and lock it for the block, so that :func:`prune` leaves it alone.

    When the block ends, checkpoints and temporary files are removed.
    """
    directory = root / f"{job_id}.{attempt}"
    # No other process works here: an attempt has one worker. A directory of this name is of an earlier database.
    shutil.rmtree(directory, ignore_errors=True)
    scratch = root / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
    scratch.mkdir(parents=True, mode=0o700)
    lock = os.open(scratch / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in ("run", "tmp"):
            (scratch / part).mkdir()
        # The directory gets its name once it is locked, so that no other process finds it unlocked.
        scratch.rename(directory)
        yield AttemptDir(directory)
    finally:
        _remove_bulky_files(directory)
        os.close(lock)


def stage_inputs(
    directory: AttemptDir,
    store: ArtifactStore,
    spec: DistillationSpec,
    *,
    posted_spec: DistillationSpec,
    ranking_jobs: list[str],
    training_states: Sequence[StoredCheckpoint],
    compared: Mapping[str, str | None],
    run_name: Mapping[str, str],
) -> StoredCheckpoint | None:
    """Write the inputs of the engine: its specification, and the ranking, answers and training state to continue from.

    Args:
        posted_spec: `spec` with the ids that became paths of this machine.
        ranking_jobs: Ids of the jobs whose ranking may be copied, best first. The engine uses a ranking only if its
            inputs are those of the specification.
        training_states: Training states in the store, best first. A damaged one is skipped for the next.
        compared: The store keys of what the report shows of the job that a control is compared with, by name; null for
            what is gone, which the engine warns of.
        run_name: How the report calls the run.

    Returns:
        The training state that was copied; None where there is none whole, so that the engine begins at the start.
    """
    directory.spec_file.write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    directory.posted_spec_file.write_text(posted_spec.model_dump_json(indent=1), encoding="utf-8")
    (directory.workdir / ABOUT_FILE).write_text(json.dumps(run_name), encoding="utf-8")
    for name in _CARRIED_FILES:
        for job_id in ranking_jobs:
            try:
                store.fetch_file(ranking_key(job_id, name), directory.workdir / name)
            except ArtifactNotFound:
                _log.debug("ranking_not_stored_yet", file=name, ranking_job=job_id)
                continue
            break
    if compared:
        (directory.workdir / COMPARED_DIR).mkdir()
    for name, key in compared.items():
        if key is None:
            continue
        try:
            store.fetch_file(key, directory.workdir / COMPARED_DIR / name)
        except (ArtifactCorrupt, ArtifactNotFound) as error:
            _log.warning("compared_job_not_shown", file=name, error=str(error))
    for state in training_states:
        try:
            store.checkout(state.store_key, directory.workdir / checkpoint_dir(state.step))
        except (ArtifactCorrupt, ArtifactNotFound) as error:
            _log.warning("training_state_skipped", store_key=state.store_key, error=str(error))
            continue
        return state
    return None


def ranking_key(job_id: str, name: str) -> str:
    """The key of a ranking file in the store. It is the same for each attempt: equal inputs give an equal ranking."""
    return f"jobs/{job_id}/ranking/{name}"


def prune(root: Path, *, keep: int, now: Callable[[], float] = time.time) -> None:
    """Remove what killed workers left, and all but the newest `keep` directories that are not locked."""
    unlocked = [directory for directory in root.glob("job_*") if _is_unlocked(directory)]
    for directory in unlocked:
        _remove_bulky_files(directory)
    unlocked.sort(key=_modified_at, reverse=True)
    abandoned = [
        directory
        for directory in root.glob(f"{SCRATCH_PREFIX}*")
        if now() - _modified_at(directory) > _MAX_SCRATCH_AGE_SECONDS
    ]
    for directory in (*unlocked[keep:], *abandoned):
        shutil.rmtree(directory, ignore_errors=True)


def _is_unlocked(directory: Path) -> bool:
    try:
        lock = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # Another process is removing it.
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _remove_bulky_files(directory: Path) -> None:
    """Remove checkpoints, inputs and temporary files; the log, the events and the figures of the attempt stay."""
    for name in ("tmp", "inputs"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for entry in (directory / "run").glob("*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def _modified_at(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0
