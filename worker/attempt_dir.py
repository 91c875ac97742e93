"""The directory of an attempt: made whole before the engine starts, held while it runs, tidied afterwards.

WORK_ROOT/JOB.2/            the second attempt
    spec.json     the specification with ids resolved to paths
    engine.log     what the engine wrote to stderr
    run/           the engine's own directory
    tmp/           its temporary files
    .held          locked by the supervisor
"""

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.jobs.leases import StoredCheckpoint
from pocl.layout import PARTIAL_RANKING_FILE, RANKING_FILE, RANKING_INPUTS_FILE, checkpoint_dir
from pocl.spec import DistillationSpec

log = logging.getLogger(__name__)

_LOCK = ".held"
_NEW = ".new-"
_HALF_MADE_SECONDS = 3600
# The engine takes a ranking only with its inputs, which vouch for it; each line of a partial one is sealed.
_RANKING_FILES = (RANKING_FILE, RANKING_INPUTS_FILE, PARTIAL_RANKING_FILE)


@dataclass(frozen=True)
class AttemptDir:
    path: Path

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.json"

    @property
    def log(self) -> Path:
        return self.path / "engine.log"

    @property
    def workdir(self) -> Path:
        return self.path / "run"

    @property
    def temp_dir(self) -> Path:
        return self.path / "tmp"

    def locate(self, path: str) -> Path:
        """A path that the engine reported, relative to its directory.

        Raises:
            ValueError: it leads out of the directory.
        """
        place = self.workdir / path
        if not place.resolve().is_relative_to(self.workdir.resolve()):
            raise ValueError("a path of the engine leads out of its directory")
        return place


@contextmanager
def locked(root: Path, job_id: str, attempt: int) -> Iterator[AttemptDir]:
    """An empty workplace, which nobody tidies while the block runs. Bulky files go when it ends."""
    directory = root / f"{job_id}.{attempt}"
    # No other process works here: an attempt has one worker. What is there, an earlier database left.
    shutil.rmtree(directory, ignore_errors=True)
    made = root / f"{_NEW}{uuid.uuid4().hex}"
    made.mkdir(parents=True, mode=0o700)
    lock = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in ("run", "tmp"):
            (made / part).mkdir()
        # It gets its name once it is held, so nobody finds it unheld.
        made.rename(directory)
        yield AttemptDir(directory)
    finally:
        _drop_bulk(directory)
        os.close(lock)


def stage_inputs(
    place: AttemptDir,
    store: ArtifactStore,
    spec: DistillationSpec,
    *,
    ranking_jobs: list[str],
    training_states: Sequence[StoredCheckpoint],
) -> None:
    """Put in what the engine needs to begin, or to go on where an earlier attempt was.

    Args:
        ranking_jobs: jobs whose ranking it may take, best first; the engine takes only one of its own inputs.
        training_states: training training_states in the store, best first; a damaged one is passed over for the next.
    """
    place.spec_file.write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    for name in _RANKING_FILES:
        for job_id in ranking_jobs:
            try:
                shutil.copyfile(store.locate(ranking_key(job_id, name)), place.workdir / name)
            except ArtifactNotFound:
                log.debug("no %s of %s yet", name, job_id)
                continue
            break
    for state in training_states:
        try:
            store.checkout(state.store_key, place.workdir / checkpoint_dir(state.step))
        except (ArtifactCorrupt, ArtifactNotFound) as error:
            log.warning("the training state %s was passed over: %s", state.store_key, error)
            continue
        return


def ranking_key(job_id: str, name: str) -> str:
    """Where the ranking of a job is stored; the same for each attempt, since equal inputs give an equal ranking."""
    return f"jobs/{job_id}/ranking/{name}"


def prune(root: Path, *, keep: int, now: Callable[[], float] = time.time) -> None:
    """Drop what dead workers left, and all but the newest `keep` workplaces that nobody holds."""
    free = [directory for directory in root.glob("job_*") if _is_free(directory)]
    for directory in free:
        _drop_bulk(directory)
    free.sort(key=_age, reverse=True)
    half_made = [directory for directory in root.glob(f"{_NEW}*") if now() - _age(directory) > _HALF_MADE_SECONDS]
    for directory in (*free[keep:], *half_made):
        shutil.rmtree(directory, ignore_errors=True)


def _is_free(directory: Path) -> bool:
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
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


def _drop_bulk(directory: Path) -> None:
    """Remove checkpoints and temporary files; what tells how the attempt went stays."""
    shutil.rmtree(directory / "tmp", ignore_errors=True)
    for entry in (directory / "run").glob("*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def _age(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0
