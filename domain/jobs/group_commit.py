"""Group commit: jobs that are submitted at the same time are written by one transaction.

The first of them writes; those that come meanwhile wait for it, and the next transaction takes all of them. So one that
comes alone waits for nothing, and a commit, a lock and a count serve many. Each is in the database before its
:meth:`GroupCommit.submit` returns.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import ApiError
from domain.jobs.queue import QueuedJob
from domain.jobs.submission import Submission, create_jobs
from domain.settings import Settings

Created = QueuedJob | ApiError

MAX_JOBS: Final = 16
"""Jobs of one transaction at most."""


@dataclass
class _Pending:
    """A submission, and what became of it: null until it was written."""

    submission: Submission
    outcome: QueuedJob | Exception | None = None


class _Group:
    """What waits to be written of one project: quotas are counted for each under a lock of its own."""

    def __init__(self) -> None:
        self.pending: list[_Pending] = []
        self.writing = threading.Lock()


class GroupCommit:
    """Writes submissions of many threads; those of a project together.

    Args:
        create: puts submissions into the queue.
    """

    def __init__(self, database: Database, *, create: Callable[..., list[Created]] = create_jobs) -> None:
        self._create_jobs = create
        self._database = database
        self._lock = threading.Lock()
        self._groups: WeakValueDictionary[str, _Group] = WeakValueDictionary()

    def submit(self, settings: Settings, project: str, submission: Submission) -> QueuedJob:
        """Put a planned job into the queue, and wait until that is committed.

        Raises:
            ApiError: as :func:`domain.jobs.submission.create_job` says.
            DatabaseUnavailable: the database is at fault; after the commit was tried, it may have taken place.
        """
        own = _Pending(submission)
        with self._lock:
            group = self._groups.setdefault(project, _Group())
            group.pending.append(own)
        while own.outcome is None:
            with group.writing:
                if own.outcome is None:
                    with self._lock:
                        batch, group.pending = group.pending[:MAX_JOBS], group.pending[MAX_JOBS:]
                    self._write(settings, project, batch)
        if isinstance(own.outcome, Exception):
            raise own.outcome
        return own.outcome

    def waiting(self, project: str) -> int:
        """How many submissions of a project wait for the next transaction."""
        group = self._groups.get(project)
        return 0 if group is None else len(group.pending)

    def is_writing(self, project: str) -> bool:
        """Whether a transaction with submissions of a project is under way."""
        group = self._groups.get(project)
        return group is not None and group.writing.locked()

    def _write(self, settings: Settings, project: str, batch: Sequence[_Pending]) -> None:
        try:
            outcomes: Sequence[QueuedJob | Exception] = self._create(
                settings, project, [each.submission for each in batch]
            )
        except DatabaseUnavailable as error:
            outcomes = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 # it is raised by the threads whose submissions it is about
            # One of them may be what cannot be written.
            if len(batch) > 1:
                for each in batch:
                    self._write(settings, project, [each])
                return
            outcomes = [error]
        for each, outcome in zip(batch, outcomes, strict=True):
            each.outcome = outcome

    def _create(self, settings: Settings, project: str, submissions: Sequence[Submission]) -> list[Created]:
        with self._database.transaction(write=True) as session:
            return self._create_jobs(session, settings, submissions, project=project)
