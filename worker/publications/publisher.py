"""Pushes publications that are due: a few threads of a scheduler, each with one lease and one process at a time.

Of several schedulers any that has a token pushes: the lease of each publication keeps them apart.
"""

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import LostLease
from domain.jobs.publication_checks import OWNER_NOT_ALLOWED, explain_owner, may_publish_to
from domain.jobs.publication_feed import (
    DuePublication,
    claim_publication,
    has_due_publication,
    record_failed_push,
    record_published,
    release_publication,
    renew_publication,
)
from domain.jobs.publication_start import CHECKPOINT_MISSING
from domain.settings import Settings
from worker.publications.process import BrokenOff, PushProcess
from worker.publications.push import CannotPush, Push, Pushed
from worker.row_lease import renewed_lease, wait_after
from worker.scratch_directory import ScratchDirectory
from worker.settings import WorkerSettings

_log = structlog.get_logger(__name__)

LEASE_SECONDS: Final = 90.0
_IDLE_SECONDS: Final = 2.0
_END_SECONDS: Final = 10.0
"""How long the end of a scheduler waits for files that are being fetched."""
_MAX_RETRY_AFTER: Final = 4 * 3600.0


@dataclass
class HubPublisher:
    """The pushes of one scheduler."""

    database: Database
    store: ArtifactStore
    owners: Sequence[str]
    """The owners of repositories that may be written."""
    process: PushProcess | None
    """What pushes; null where the scheduler has no token."""
    threads: int = 1
    scratch: ScratchDirectory | None = None
    """Where files are fetched to that are in a bucket; null where they are on this machine."""
    lease_seconds: float = LEASE_SECONDS
    jitter: Callable[[], float] = random.random
    _stopping: threading.Event = field(default_factory=threading.Event)
    _started: list[threading.Thread] = field(default_factory=list)

    @property
    def is_available(self) -> bool:
        """Whether this scheduler pushes."""
        return self.process is not None

    def start(self) -> None:
        """Begin to push what is due."""
        if self.process is not None:
            self._started += [
                threading.Thread(target=self._run, name=f"publisher-{number}", daemon=True)
                for number in range(self.threads)
            ]
        for thread in self._started:
            thread.start()

    def close(self) -> None:
        """Break off what is under way, and leave it to the next scheduler."""
        self._stopping.set()
        until = time.monotonic() + _END_SECONDS
        for thread in self._started:
            thread.join(max(0.0, until - time.monotonic()))
        if hanging := [thread.name for thread in self._started if thread.is_alive()]:
            # These threads end with this process; the next scheduler removes the files.
            _log.error("publishers_not_stopped", threads=hanging)
        elif self.scratch is not None:
            self.scratch.remove()

    def turn(self) -> bool:
        """Push one student, if one is due; whether one was.

        Raises:
            DatabaseUnavailable: the rows could not be read or written; the lease runs out.
        """
        if self.process is None:
            return False
        with self.database.transaction(write=False) as session:
            if not has_due_publication(session):
                return False
        with self.database.transaction(write=True) as session:
            due = claim_publication(session, lease_seconds=self.lease_seconds)
        if due is None:
            return False
        try:
            self._attempt(due, self.process)
        except LostLease:
            _log.warning("publication_lease_lost", job_id=due.job_id)
        return True

    def _attempt(self, due: DuePublication, process: PushProcess) -> None:
        try:
            with renewed_lease(
                self.database,
                lambda session: renew_publication(session, due, lease_seconds=self.lease_seconds),
                lease_seconds=self.lease_seconds,
            ) as is_lost:
                pushed = self._push(due, process, lambda: self._stopping.is_set() or is_lost.is_set())
        except BrokenOff:
            with self.database.transaction(write=True) as session:
                release_publication(session, due)
        except CannotPush as error:
            self._fail(due, error)
        except (ArtifactNotFound, ArtifactCorrupt):
            self._fail(due, CannotPush(CHECKPOINT_MISSING, "The files of the checkpoint are gone.", is_final=True))
        except OSError as error:
            _log.error("publication_files_not_read", job_id=due.job_id, error=str(error))
            self._fail(due, CannotPush("storage_failed", "The files of the checkpoint could not be read."))
        else:
            with self.database.transaction(write=True) as session:
                record_published(session, due, commit=pushed.commit, url=pushed.url)
            _log.info("published", job_id=due.job_id, repo=due.repo, commit=pushed.commit, is_new=pushed.is_new)

    def _push(self, due: DuePublication, process: PushProcess, is_broken_off: Callable[[], bool]) -> Pushed:
        if not may_publish_to(self.owners, due.repo):
            # The operator has taken it away since the job was submitted.
            raise CannotPush(OWNER_NOT_ALLOWED, f"{explain_owner(self.owners, due.repo)}.", is_final=True)
        files = self.store.manifest(due.store_key).files
        with self._fetched(due) as directory:
            title = f"Student of {due.job_id}"
            return process.push(Push(due.repo, due.branch, due.private, directory, files, title), is_broken_off)

    @contextmanager
    def _fetched(self, due: DuePublication) -> Iterator[Path]:
        """The directory of the files, on this machine for as long as the block lasts."""
        if self.scratch is None:
            yield self.store.directory(due.store_key)
            return
        directory = self.scratch.path / due.job_id
        shutil.rmtree(directory, ignore_errors=True)
        try:
            yield self.store.provide_directory(due.store_key, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _fail(self, due: DuePublication, error: CannotPush) -> None:
        wait = None if error.is_final else self._wait(due.attempts, error.retry_after)
        with self.database.transaction(write=True) as session:
            was_last = record_failed_push(session, due, error.code, error.message, wait_seconds=wait)
        facts = {"job_id": due.job_id, "repo": due.repo, "code": error.code, "attempt": due.attempts}
        _log.warning("publication_failed" if was_last else "publication_attempt_failed", **facts)

    def _wait(self, attempts: int, retry_after: float | None) -> float:
        return max(wait_after(attempts, self.jitter()), min(retry_after or 0.0, _MAX_RETRY_AFTER))

    def _run(self) -> None:
        while not self._stopping.is_set():
            has_more = False
            try:
                has_more = self.turn()
            except DatabaseUnavailable as error:
                _log.warning("database_unavailable", error=str(error))
            except Exception:  # noqa: BLE001 - whatever it is, the lease runs out, and the next turn goes on
                _log.exception("publication_turn_failed")
            if not has_more:
                self._stopping.wait(_IDLE_SECONDS)


def create_publisher(
    database: Database, store: ArtifactStore, settings: Settings, options: WorkerSettings
) -> HubPublisher:
    """The publisher that the settings describe."""
    token = settings.hub_write_token
    if token is None:
        return HubPublisher(database, store, settings.hub_publish_to, None)
    process = PushProcess(token.get_secret_value(), timeout_seconds=options.publish_timeout_seconds)
    scratch = ScratchDirectory.make(settings.home / "publications") if store.is_remote else None
    return HubPublisher(
        database, store, settings.hub_publish_to, process, threads=options.publish_uploads, scratch=scratch
    )
