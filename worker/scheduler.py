"""One small loop beside the workers: reap expired leases, ring for queued jobs, report the broker, collect garbage.

Any number of schedulers may run. Each duty is guarded by the rows, or idempotent.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import InstrumentedAttribute

from domain.artifacts import ArtifactStore
from domain.database_errors import DatabaseUnavailable
from domain.datasets.models import Dataset
from domain.db import Database
from domain.idempotency.repository import delete_expired
from domain.jobs.models import Job
from domain.jobs.retries import RetryPolicy, count_claimable
from domain.settings import Settings
from domain.workers.repository import (
    count_due_checks,
    delete_stale_schedulers,
    delete_stale_workers,
    record_scheduler,
)
from worker.doorbell import BrokerUnreachable, Doorbell
from worker.reaper import Reaper
from worker.settings import WorkerSettings

_log = structlog.get_logger(__name__)

_STALE_SECONDS = 3600


@dataclass(frozen=True)
class Scheduler:
    database: Database
    store: ArtifactStore
    doorbell: Doorbell
    settings: Settings
    options: WorkerSettings
    name: str = "scheduler"
    """The name of this process, unique among the schedulers."""

    @cached_property
    def reaper(self) -> Reaper:
        return Reaper(self.database, self.settings.lease_seconds, self.settings.reaper_seconds)

    def run(self, wait: Callable[[float], bool], clock: Callable[[], float] = time.monotonic) -> None:
        """Run each duty when it is due.

        Args:
            wait: Sleeps for a number of seconds; true ends the loop.
        """
        duties: tuple[tuple[Callable[[], object], float], ...] = (
            (self.reaper.look, self.settings.reaper_seconds),
            (self.ring, self.options.doorbell_seconds),
            (self.collect_garbage, self.options.janitor_seconds),
            (self.report, self.settings.heartbeat_seconds),
        )
        due = [clock()] * len(duties)
        while True:
            for index, (duty, interval) in enumerate(duties):
                if clock() >= due[index]:
                    _run_duty(duty)
                    due[index] = clock() + interval
            if wait(max(0.0, min(due) - clock())):
                return

    def ring(self) -> int:
        """Ring once for each job that may be claimed, and for each quarantined worker that is to check itself, as far
        as no message waits; the number of rings.
        """
        with self.database.transaction(write=False) as session:
            claimable = count_claimable(session, RetryPolicy.from_settings(self.settings))
            due_checks = count_due_checks(session)
        return self.doorbell.ring_for(claimable + due_checks, limit=self.options.doorbell_limit)

    def report(self) -> bool:
        """Record that this scheduler lives, and whether it reaches the broker: by that the API says why jobs wait."""
        try:
            self.doorbell.waiting()
            reaches_broker = True
        except BrokerUnreachable:
            reaches_broker = False
        with self.database.transaction(write=True) as session:
            record_scheduler(session, self.name, reaches_broker=reaches_broker)
        return reaches_broker

    def collect_garbage(self) -> int:
        """Remove scratch files of killed processes, files of deleted jobs and data sets, expired idempotency keys and
        lost workers; the number of files and keys removed.
        """
        removed = self.store.remove_stale(_STALE_SECONDS)
        with self.database.transaction(write=True) as session:
            delete_stale_workers(session)
            delete_stale_schedulers(session)
            removed += delete_expired(session.connection())
        with self.database.transaction(write=False) as session:
            if session.scalars(sa.select(Job.id).limit(1)).one_or_none() is None:
                # An empty database with a full store is most often a wrong setting: it must not empty the store.
                return removed
        # A job's row is there before its first file, a data set's only after it.
        jobs = {key.rpartition("/")[2]: key for key in self.store.list_keys("jobs")}
        datasets = {key: key for key in self.store.list_keys("datasets", older_than=_STALE_SECONDS)}
        return (
            removed + self._remove_unreferenced(jobs, Job.id) + self._remove_unreferenced(datasets, Dataset.store_key)
        )

    def _remove_unreferenced(self, stored: Mapping[str, str], column: InstrumentedAttribute[str]) -> int:
        """Remove the stored files that no row names; the number of them.

        Args:
            stored: Keys of the store by the value of `column` that names them. They are listed before the rows are
                read, so that a file that appears meanwhile is not taken for unreferenced.
        """
        removed = 0
        for chunk in _chunks(list(stored), 500):
            with self.database.transaction(write=False) as session:
                known = set(session.scalars(sa.select(column).where(column.in_(chunk))))
            for name in set(chunk) - known:
                self.store.remove(stored[name])
                removed += 1
        return removed


def _run_duty(duty: Callable[[], object]) -> None:
    try:
        duty()
    except BrokerUnreachable as error:
        _log.warning("broker_unreachable", error=str(error))
    except DatabaseUnavailable as error:
        _log.warning("database_unavailable", error=str(error))
    except OSError as error:
        _log.error("artifact_store_failed", error=str(error))
    except Exception:  # noqa: BLE001 - one duty must not end the others, and with them the embedded set-up and its job
        _log.exception("duty_failed")


def _chunks(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]
