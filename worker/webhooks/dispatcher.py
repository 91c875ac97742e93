"""Delivers due messages with a bounded number of threads, so that a slow endpoint delays no other.

Each thread has the lease on one endpoint, and sends its due messages one after the other for a while. At most half of
the threads are for endpoints whose last attempt failed.
"""

import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import version
from threading import Event, Lock
from typing import Final

import structlog
from sqlalchemy.orm import Session

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import LostLease
from domain.settings import Settings
from domain.webhooks.deliveries import (
    LEASE_SECONDS,
    AttemptResult,
    DueMessage,
    EndpointLease,
    claim_endpoint,
    delete_old,
    give_up_expired,
    has_due,
    record_attempt,
)
from domain.webhooks.outbox import empty_outbox, has_events
from domain.webhooks.repository import database_time
from worker.settings import WorkerSettings

_log = structlog.get_logger(__name__)

_TURN_SECONDS: Final = 30.0
"""How long an endpoint keeps its thread while others wait."""
_MAX_BATCHES: Final = 20


@dataclass
class WebhookDispatcher:
    """The deliveries of one process. Any number of processes may deliver."""

    database: Database
    send: Callable[[DueMessage], AttemptResult]
    threads: int
    """How many messages are sent at once at most."""
    disable_after: timedelta
    """How long an endpoint may fail before it is disabled."""
    attempt_seconds: float = 15
    """How long `send` may take."""
    now: Callable[[Session], datetime] = database_time
    jitter: Callable[[], float] = random.random
    _stopping: Event = field(default_factory=Event)
    _lock: Lock = field(default_factory=Lock)
    _running: int = 0
    _running_for_failing: int = 0

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="webhook")

    def look(self) -> list[Future[None]]:
        """Write the messages about new events, and begin to deliver those that are due, as far as threads are free."""
        self.write_messages()
        begun: list[Future[None]] = []
        while not self._stopping.is_set() and self._running < self.threads:
            claimed = self._claim()
            if claimed is None:
                break
            begun.append(self._begin(*claimed))
        return begun

    def write_messages(self) -> int:
        """Empty the outbox of events; how many were in it."""
        written = 0
        for _ in range(_MAX_BATCHES):
            with self.database.transaction(write=False) as session:
                if not has_events(session):
                    break
            with self.database.transaction(write=True) as session:
                count = empty_outbox(session, now=self.now(session))
            written += count
            if not count:
                break
        return written

    def collect_garbage(self, *, older_than: timedelta, kept: int) -> int:
        """Give up messages that have expired, and delete old rows; the number of rows deleted."""
        with self.database.transaction(write=True) as session:
            now = self.now(session)
            give_up_expired(session, now=now)
            return delete_old(session, now=now, older_than=older_than, kept=kept)

    def close(self) -> None:
        """Begin no more deliveries, and wait for those that are under way."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _claim(self) -> tuple[EndpointLease, DueMessage] | None:
        healthy_only = self._running_for_failing >= max(1, self.threads // 2)
        with self.database.transaction(write=False) as session:
            if not has_due(session, now=self.now(session), healthy_only=healthy_only):
                return None
        with self.database.transaction(write=True) as session:
            return claim_endpoint(session, now=self.now(session), healthy_only=healthy_only)

    def _begin(self, lease: EndpointLease, message: DueMessage) -> Future[None]:
        with self._lock:
            self._running += 1
            self._running_for_failing += lease.failing
        claimed_at = time.monotonic()
        return self._pool.submit(self._deliver, lease, message, claimed_at)

    def _deliver(self, lease: EndpointLease, first: DueMessage, claimed_at: float) -> None:
        try:
            self._deliver_in_turn(lease, first, claimed_at)
        except LostLease:
            _log.warning("webhook_lease_lost", webhook=lease.endpoint_id)
        except DatabaseUnavailable as error:
            # The lease expires, and the message is sent again.
            _log.warning("webhook_delivery_not_recorded", webhook=lease.endpoint_id, error=str(error))
        except Exception:  # noqa: BLE001 - whatever it is ends this turn alone
            _log.exception("webhook_delivery_broke_off", webhook=lease.endpoint_id)
        finally:
            with self._lock:
                self._running -= 1
                self._running_for_failing -= lease.failing

    def _deliver_in_turn(self, lease: EndpointLease, first: DueMessage, claimed_at: float) -> None:
        message: DueMessage | None = first
        leased_at = claimed_at
        while message is not None:
            if time.monotonic() - leased_at > LEASE_SECONDS - 2 * self.attempt_seconds:
                # The machine was suspended, or the database took long: another process may have the endpoint soon.
                return
            result = self.send(message)
            _log_attempt(lease, message, result)
            ends = self._stopping.is_set() or time.monotonic() - claimed_at > _TURN_SECONDS
            leased_at = time.monotonic()
            with self.database.transaction(write=True) as session:
                message = record_attempt(
                    session,
                    lease,
                    message.id,
                    result,
                    now=self.now(session),
                    jitter=self.jitter(),
                    disable_after=self.disable_after,
                    ends=ends,
                )


def _log_attempt(lease: EndpointLease, message: DueMessage, result: AttemptResult) -> None:
    # Neither the URL, which may hold a secret of the receiver, nor the body.
    facts = {"webhook": lease.endpoint_id, "delivery": message.id, "type": message.type}
    if result.error is None:
        _log.info("webhook_delivered", **facts, status_code=result.status_code, seconds=round(result.seconds, 3))
    else:
        _log.warning("webhook_attempt_failed", **facts, status_code=result.status_code, error=result.error)


def create_dispatcher(database: Database, settings: Settings, options: WorkerSettings) -> WebhookDispatcher:
    """The dispatcher that the settings describe."""
    # Imported where it is used: workers load the scheduler's modules too, and send nothing.
    from worker.webhooks.sender import WebhookSender

    sender = WebhookSender(
        frozenset(settings.webhook_internal_hosts),
        user_agent=f"pocl-service/{version('pocl-service')}",
        seconds=options.webhook_seconds,
    )
    return WebhookDispatcher(
        database,
        sender.send,
        options.webhook_threads,
        timedelta(days=settings.webhook_disable_days),
        attempt_seconds=options.webhook_seconds,
    )
