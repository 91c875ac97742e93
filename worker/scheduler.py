"""One small loop beside the workers: reap expired leases, ring for queued jobs, deliver to webhooks, forward metrics to
trackers, push students to the Hub, collect garbage.

Any number of schedulers may run, of which one leads and does these duties; each is guarded by the rows as well, or
idempotent. See :mod:`worker.leadership`. What may take long, deleting what has expired and removing files, has a thread
of its own, so that no job waits for it.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Final

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import InstrumentedAttribute

from domain.artifacts import ArtifactStore
from domain.chat.repository import count_waiting
from domain.database_errors import DatabaseUnavailable
from domain.datasets.models import Dataset
from domain.db import Database
from domain.idempotency.repository import delete_expired
from domain.jobs.export_feed import give_up_exports
from domain.jobs.models import Job
from domain.jobs.publication_feed import give_up_publications
from domain.jobs.retries import RetryPolicy, count_claimable
from domain.jobs.usage import record_storage_today
from domain.keys.repository import delete_stale_keys
from domain.settings import Settings
from domain.workers.repository import (
    another_reaches_broker,
    count_due_checks,
    delete_stale_schedulers,
    delete_stale_workers,
    record_scheduler,
)
from worker.chat.expiry import ChatExpiry
from worker.doorbell import BrokerUnreachable, Doorbell
from worker.expiry import ExpiryCollector
from worker.garbage import remove_deleted_checkpoints
from worker.leadership import Leadership, LeadershipLost
from worker.publications.publisher import HubPublisher, create_publisher
from worker.reaper import Reaper
from worker.settings import WorkerSettings
from worker.trackers.forwarder import TrackerForwarder, create_forwarder
from worker.webhooks.dispatcher import WebhookDispatcher, create_dispatcher

_log = structlog.get_logger(__name__)

_STALE_SECONDS = 3600
_JANITOR_GRACE_SECONDS: Final = 5.0
"""How long the end of a scheduler waits for what it is deleting, which may be broken off anywhere."""


@dataclass(frozen=True)
class Scheduler:
    database: Database
    store: ArtifactStore
    doorbell: Doorbell
    settings: Settings
    options: WorkerSettings
    name: str = "scheduler"
    """The name of this process, unique among the schedulers."""
    leadership: Leadership | None = None
    """Whether this scheduler leads; null for one that is alone."""

    @cached_property
    def duties_database(self) -> Database:
        """The database of the duties, in which only the leader writes."""
        return self.database if self.leadership is None else self.leadership.duties_database

    @cached_property
    def reaper(self) -> Reaper:
        return Reaper(self.duties_database, self.settings.lease_seconds, self.settings.reaper_seconds)

    @cached_property
    def chats(self) -> ChatExpiry:
        return ChatExpiry(self.duties_database, self.settings.lease_seconds, self.settings.chat_kept_seconds)

    @cached_property
    def webhooks(self) -> WebhookDispatcher:
        # A delivery is guarded by the lease of its endpoint, and recorded also where another scheduler leads by then:
        # otherwise that one would send the message again.
        return create_dispatcher(self.database, self.settings, self.options)

    @cached_property
    def trackers(self) -> TrackerForwarder:
        return create_forwarder(self.database, self.store, self.settings, self.options, self.name)

    @cached_property
    def publisher(self) -> HubPublisher:
        # As a delivery, a push is guarded by its own lease, whoever leads.
        return create_publisher(self.database, self.store, self.settings, self.options)

    @cached_property
    def expiry(self) -> ExpiryCollector:
        return ExpiryCollector(self.duties_database, self.store, self.name)

    def run(self, wait: Callable[[float], bool], clock: Callable[[], float] = time.monotonic) -> None:
        """Run each duty when it is due.

        Args:
            wait: Sleeps for a number of seconds; true ends the loop.
        """
        duties: tuple[tuple[Callable[[], object], float], ...] = (
            (self.reaper.look, self.settings.reaper_seconds),
            (self.ring, self.options.doorbell_seconds),
            (self.chats.look, self.settings.reaper_seconds),
            (self.webhooks.look, self.options.doorbell_seconds),
        )
        due = [clock()] * len(duties)
        report_due, led = clock(), self.leadership is None
        renewing = nullcontext() if self.leadership is None else self.leadership.renewing()
        with closing(self.webhooks), closing(self.trackers), closing(self.publisher), renewing, self._cleaning():
            # Each channel is led by itself: the scheduler that leads may lack the package, or the way to the server.
            self.trackers.start()
            self.publisher.start()
            while True:
                leads = self._leads()
                if leads and not led:
                    # What others did meanwhile is not known: leases were looked at, and everything may be due.
                    self.reaper.looked_at = None
                    due = [clock()] * len(duties)
                led = leads
                for index, (duty, interval) in enumerate(duties):
                    if clock() >= due[index]:
                        if self._leads():
                            _run_duty(duty)
                        due[index] = clock() + interval
                if clock() >= report_due:
                    _run_duty(self.report)
                    report_due = clock() + self.settings.heartbeat_seconds
                if wait(max(0.0, min(report_due, *due) - clock())):
                    return

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """Delete what has expired, and remove files, in a thread beside the block."""
        is_over = threading.Event()
        janitor = threading.Thread(target=self._clean_until, args=(is_over,), name="janitor", daemon=True)
        janitor.start()
        try:
            yield
        finally:
            is_over.set()
            janitor.join(_JANITOR_GRACE_SECONDS)

    def _clean_until(self, is_over: threading.Event) -> None:
        while True:
            leads = self.leadership is None or self.leadership.is_leader
            if leads:
                _run_duty(self.expiry.turn)
                _run_duty(self.collect_garbage)
            if is_over.wait(self.options.janitor_seconds if leads else self.settings.heartbeat_seconds):
                return

    def _leads(self) -> bool:
        return self.leadership is None or self.leadership.leads()

    def ring(self) -> int:
        """Ring once for each job that may be claimed, each conversation that waits, and each quarantined worker that is
        to check itself, as far as no message waits; the number of rings.
        """
        with self.database.transaction(write=False) as session:
            claimable = count_claimable(
                session, RetryPolicy.from_settings(self.settings), limit=self.options.doorbell_limit
            )
            due = count_due_checks(session) + count_waiting(session, limit=self.options.doorbell_limit)
        return self.doorbell.ring_for(claimable + due, limit=self.options.doorbell_limit)

    def report(self) -> bool:
        """Record that this scheduler lives, and whether it reaches the broker: by that the API says why jobs wait. A
        leader that does not reach it leaves its place to one that does.
        """
        try:
            self.doorbell.waiting()
            reaches_broker = True
        except BrokerUnreachable:
            reaches_broker = False
        with self.database.transaction(write=True) as session:
            record_scheduler(
                session,
                self.name,
                reaches_broker=reaches_broker,
                trackers=self.trackers.names,
                publishes=self.publisher.is_available,
            )
            another_does = not reaches_broker and another_reaches_broker(
                session, self.name, 2 * self.settings.heartbeat_seconds
            )
        if another_does and self.leadership is not None and self.leadership.leads():
            self.leadership.step_aside()
        return reaches_broker

    def collect_garbage(self) -> int:
        """Remove scratch files of killed processes, files of deleted checkpoints, jobs and data sets, expired
        idempotency keys, lost workers and old deliveries of webhooks, give up publications and exports that are out of
        time, and note how many bytes each project takes; the number of files, keys and deliveries removed.
        """
        removed = self.store.remove_stale(_STALE_SECONDS)
        database = self.duties_database
        removed += remove_deleted_checkpoints(database, self.store)
        removed += self.webhooks.collect_garbage(
            older_than=timedelta(days=self.settings.webhook_delivery_days), kept=self.settings.max_webhook_deliveries
        )
        with database.transaction(write=True) as session:
            delete_stale_workers(session)
            delete_stale_schedulers(session)
            delete_stale_keys(session)
            give_up_publications(session)
            give_up_exports(session)
            record_storage_today(session)
            removed += delete_expired(session.connection())
        with database.transaction(write=False) as session:
            if session.scalars(sa.select(Job.id).limit(1)).one_or_none() is None:
                # An empty database with a full store is most often a wrong setting: it must not empty the store.
                return removed
        # A job's row is there before its first file, a data set's only after it.
        jobs = {key.rpartition("/")[2]: key for key in self.store.list_keys("jobs")}
        datasets = {key: key for key in self.store.list_keys("datasets", older_than=_STALE_SECONDS)}
        uploads = {key.rpartition("/")[2]: key for key in self.store.list_keys("uploads", older_than=_STALE_SECONDS)}
        validating = Dataset.status == "validating"
        return (
            removed
            + self._remove_unreferenced(jobs, Job.id)
            + self._remove_unreferenced(datasets, Dataset.store_key)
            + self._remove_unreferenced(uploads, Dataset.id, validating)
        )

    def _remove_unreferenced(
        self, stored: Mapping[str, str], column: InstrumentedAttribute[str], *conditions: sa.ColumnElement[bool]
    ) -> int:
        """Remove the stored files that no row names; the number of them.

        Args:
            stored: Keys of the store by the value of `column` that names them. They are listed before the rows are
                read, so that a file that appears meanwhile is not taken for unreferenced.
            conditions: Of the rows that count.
        """
        removed = 0
        for chunk in _chunks(list(stored), 500):
            with self.database.transaction(write=False) as session:
                known = set(session.scalars(sa.select(column).where(column.in_(chunk), *conditions)))
            for name in set(chunk) - known:
                self.store.remove(stored[name])
                removed += 1
        return removed


def _run_duty(duty: Callable[[], object]) -> None:
    try:
        duty()
    except BrokerUnreachable as error:
        _log.warning("broker_unreachable", error=str(error))
    except LeadershipLost:
        _log.warning("leadership_lost", hint="Another scheduler leads: this one writes nothing more.")
    except DatabaseUnavailable as error:
        _log.warning("database_unavailable", error=str(error))
    except OSError as error:
        _log.error("artifact_store_failed", error=str(error))
    except Exception:  # noqa: BLE001 - one duty must not end the others, and with them the embedded set-up and its job
        _log.exception("duty_failed")


def _chunks(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]
