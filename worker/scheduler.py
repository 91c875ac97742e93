"""One small loop beside the workers: take jobs from the lost, ring for the waiting, clear away what was left.

Any number of schedulers may run. All that they do is guarded by the rows, or harmless twice.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute

from domain.artifacts import ArtifactStore
from domain.datasets.models import Dataset
from domain.db import DATABASE_UNAVAILABLE, Database
from domain.idempotency.repository import delete_expired
from domain.jobs.leases import expire_waiting, reap_expired
from domain.jobs.models import Job
from domain.jobs.repository import count_queued_jobs
from domain.settings import Settings
from domain.workers.repository import delete_stale_workers
from worker.doorbell import BrokerUnreachable, Doorbell
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_STALE_SECONDS = 3600


@dataclass(frozen=True)
class Scheduler:
    database: Database
    store: ArtifactStore
    doorbell: Doorbell
    settings: Settings
    options: WorkerSettings

    def run(self, wait: Callable[[float], bool], clock: Callable[[], float] = time.monotonic) -> None:
        """Do each duty when it is due until `wait`, which sleeps for so many seconds, says to end."""
        duties: tuple[tuple[Callable[[], object], float], ...] = (
            (self.reap, self.settings.reaper_seconds),
            (self.ring, self.options.doorbell_seconds),
            (self.collect_garbage, self.options.janitor_seconds),
        )
        due = [clock()] * len(duties)
        while True:
            for place, (duty, every) in enumerate(duties):
                if clock() >= due[place]:
                    _attempt(duty)
                    due[place] = clock() + every
            if wait(max(0.0, min(due) - clock())):
                return

    def ring(self) -> int:
        """Ring once for each queued job that no ring is out for; says how often."""
        with self.database.transaction(write=False) as session:
            queued = count_queued_jobs(session)
        return self.doorbell.ring_for(queued, limit=self.options.doorbell_limit)

    def reap(self) -> list[str]:
        """Take jobs from workers that no longer answer, and end those that waited too long; the ids of the former."""
        with self.database.transaction(write=True) as session:
            reaped = reap_expired(session)
            overdue = expire_waiting(session)
        for job_id in reaped:
            log.warning("%s was taken from a worker that no longer answers", job_id)
        for job_id in overdue:
            log.warning("%s waited for a worker longer than it may", job_id)
        return reaped

    def collect_garbage(self) -> int:
        """Remove what killed processes left in the store, files of jobs and data sets that are gone, and answers that
        are no longer shown again; says how many.
        """
        removed = self.store.remove_stale(_STALE_SECONDS)
        with self.database.transaction(write=True) as session:
            delete_stale_workers(session)
            removed += delete_expired(session.connection())
        with self.database.transaction(write=False) as session:
            if session.scalars(sa.select(Job.id).limit(1)).one_or_none() is None:
                # A new database before a full store is a mistake more often than not: it must not empty the store.
                return removed
        # A job's row is there before its first file, a data set's only after it.
        jobs = {key.rpartition("/")[2]: key for key in self.store.keys("jobs")}
        datasets = {key: key for key in self.store.keys("datasets", older_than=_STALE_SECONDS)}
        return removed + self._clear_unknown(jobs, Job.id) + self._clear_unknown(datasets, Dataset.store_key)

    def _clear_unknown(self, stored: Mapping[str, str], column: InstrumentedAttribute[str]) -> int:
        """Remove what no row names; says how many.

        Args:
            stored: keys of the store by what the column names them with. Listed before the rows are asked for: what
                appears later is not taken for gone.
        """
        removed = 0
        for some in _pieces(list(stored), 500):
            with self.database.transaction(write=False) as session:
                known = set(session.scalars(sa.select(column).where(column.in_(some))))
            for name in set(some) - known:
                self.store.remove(stored[name])
                removed += 1
        return removed


def _attempt(duty: Callable[[], object]) -> None:
    try:
        duty()
    except BrokerUnreachable as error:
        log.warning("%s", error)
    except DATABASE_UNAVAILABLE as error:
        log.warning("the database is away: %s", type(error).__name__)
    except OSError as error:
        log.error("the artifact store fails: %s", error)


def _pieces(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]
