"""The state of jobs, read from the database once for all requests that need it.

Requests for a snapshot that arrive while a query runs share the next query. Subscriptions hold neither a connection
nor a thread while they wait: one task of the process polls all their jobs with one query at a time.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Final

import structlog
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync
from fastapi import Depends, Request
from starlette.types import Receive

from api.client_shares import ClientShares
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import Unavailable
from domain.jobs.live_progress import LiveProgress, live_progress
from domain.jobs.snapshot import JobSnapshot, job_snapshots

_MAX_IDS_PER_QUERY: Final = 10_000
"""Databases bound the parameters of a statement."""

_log = structlog.get_logger(__name__)


class TooManyFollowers(Unavailable):
    """As many clients follow jobs as this process can serve: poll without `wait`, or try again later."""

    code = "too_many_followers"


class Subscription:
    """The subscription of one client to the changes of one job."""

    def __init__(self, job: "_WatchedJob") -> None:
        self._job = job
        self._waiter: asyncio.Future[None] | None = None
        self._timed_out = False
        self.closed = False
        """Whether no change is delivered any more: the client has disconnected, or the service stops."""

    @property
    def latest(self) -> JobSnapshot | None:
        """The newest snapshot of the job; null where the job is deleted, or before the first snapshot."""
        return self._job.latest

    @property
    def live(self) -> LiveProgress | None:
        """How far the job is; null before the first query, and for a subscription without `live`."""
        return self._job.live

    async def wait_for(self, condition: Callable[[JobSnapshot | None], bool], *, timeout: float) -> bool:
        """Wait until the newest snapshot meets a condition.

        Returns:
            whether it does: false after `timeout` seconds, or once the subscription is closed.
        """
        self._timed_out = False
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout, self._time_out)
        try:
            while not (self._meets(condition) or self.closed or self._timed_out):
                self._waiter = loop.create_future()
                await self._waiter
        finally:
            timer.cancel()
            self._waiter = None
        return self._meets(condition)

    def notify(self) -> None:
        """Wake the task that waits, since the newest snapshot has changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """End the wait in progress, and every later one at once."""
        self.closed = True
        self.notify()

    def _meets(self, condition: Callable[[JobSnapshot | None], bool]) -> bool:
        return self._job.loaded and condition(self._job.latest)

    def _time_out(self) -> None:
        self._timed_out = True
        self.notify()


@dataclass
class _WatchedJob:
    """A job with subscriptions."""

    subscriptions: set[Subscription] = field(default_factory=set)
    loaded: bool = False
    """Whether a query has looked for the job since it is watched."""
    latest: JobSnapshot | None = None
    live: LiveProgress | None = None
    live_subscriptions: int = 0
    """How many of them want to know how far the job is."""


@dataclass
class _QueryBatch:
    """The jobs of one query, and the task that runs it."""

    job_ids: set[str] = field(default_factory=set)
    task: "asyncio.Task[Mapping[str, JobSnapshot]] | None" = None


@dataclass
class _LoopState:
    """The state of the watcher on one event loop."""

    watched: dict[str, _WatchedJob] = field(default_factory=dict)
    pending: _QueryBatch | None = None
    """The batch whose query has not begun, which further requests join."""
    query_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    """A thread of its own: requests that wait for a lock do not take it."""
    poller: "asyncio.Task[None] | None" = None
    closing: asyncio.Event = field(default_factory=asyncio.Event)


class JobWatcher:
    """Reads snapshots of jobs and delivers their changes to subscriptions, in one process.

    Args:
        poll_seconds: time between two queries for the watched jobs.
        max_followers: the number of subscriptions beyond which :meth:`subscribe` refuses; clients share them.
        worker_seconds: a worker that has been silent for longer does not count in the queue.
    """

    def __init__(self, database: Database, *, poll_seconds: float, max_followers: int, worker_seconds: float) -> None:
        self._database = database
        self._poll_seconds = poll_seconds
        self._shares = ClientShares(max_followers, TooManyFollowers)
        self._worker_seconds = worker_seconds
        self._loop_state: RunVar[_LoopState] = RunVar("job_watcher")

    async def snapshot(self, job_id: str) -> JobSnapshot | None:
        """The state of a job now: the query begins after this call. Null where there is no such job.

        Raises:
            DatabaseUnavailable: the database is at fault.
        """
        return (await self._join_query(self._state(), (job_id,))).get(job_id)

    @contextmanager
    def subscribe(self, job_id: str, *, client: str, live: bool = False) -> Iterator[Subscription]:
        """Watch a job for as long as the block lasts, on the share of a client.

        Args:
            live: whether each report of the engine counts as a change, and is read.

        Raises:
            TooManyFollowers: the process has as many subscriptions as it may.
            ClientShareExceeded: the client has as many as are free.
        """
        state = self._state()
        self._shares.take(client)
        job = state.watched.setdefault(job_id, _WatchedJob())
        subscription = Subscription(job)
        subscription.closed = state.closing.is_set()
        job.subscriptions.add(subscription)
        job.live_subscriptions += live
        if state.poller is None or state.poller.done():
            state.poller = asyncio.create_task(self._poll(state))
        try:
            yield subscription
        finally:
            self._shares.release(client)
            job.subscriptions.discard(subscription)
            job.live_subscriptions -= live
            if not job.subscriptions:
                del state.watched[job_id]

    @property
    def subscriptions(self) -> int:
        """The number of subscriptions."""
        return self._shares.total

    def close(self) -> None:
        """Close all subscriptions, since the service stops. To be called from the event loop."""
        state = self._state()
        state.closing.set()
        _close_all(state)

    async def aclose(self) -> None:
        """Close, and wait until no query is in progress."""
        self.close()
        state = self._state()
        if state.poller is not None:
            await asyncio.wait([state.poller])

    def _state(self) -> _LoopState:
        state = self._loop_state.get(None)
        if state is None:
            state = _LoopState()
            self._loop_state.set(state)
        return state

    async def _join_query(self, state: _LoopState, job_ids: Collection[str]) -> Mapping[str, JobSnapshot]:
        batch = state.pending
        if batch is None:
            batch = state.pending = _QueryBatch()
            batch.task = asyncio.create_task(self._run_query(state, batch))
        batch.job_ids.update(job_ids)
        assert batch.task is not None
        # A request that is cancelled must not cancel the query, which others share.
        return await asyncio.shield(batch.task)

    async def _run_query(self, state: _LoopState, batch: _QueryBatch) -> Mapping[str, JobSnapshot]:
        # One query after the other, so a snapshot is never older than one that was delivered before.
        async with state.query_lock:
            state.pending = None
            live_ids = [id_ for id_ in batch.job_ids if id_ in state.watched and state.watched[id_].live_subscriptions]
            snapshots, live = await run_sync(
                self._read_snapshots, sorted(batch.job_ids), sorted(live_ids), limiter=state.limiter
            )
            for job_id in batch.job_ids & state.watched.keys():
                job = state.watched[job_id]
                before = (job.latest, job.live)
                job.latest, job.live = snapshots.get(job_id), live.get(job_id, job.live)
                if not job.loaded or (job.latest, job.live) != before:
                    job.loaded = True
                    for subscription in job.subscriptions:
                        subscription.notify()
        return snapshots

    def _read_snapshots(
        self, job_ids: list[str], live_ids: list[str]
    ) -> tuple[dict[str, JobSnapshot], dict[str, LiveProgress]]:
        snapshots: dict[str, JobSnapshot] = {}
        live: dict[str, LiveProgress] = {}
        with self._database.transaction(write=False) as session:
            for first in range(0, len(job_ids), _MAX_IDS_PER_QUERY):
                chunk = job_ids[first : first + _MAX_IDS_PER_QUERY]
                snapshots |= job_snapshots(session, chunk, worker_seconds=self._worker_seconds)
            for first in range(0, len(live_ids), _MAX_IDS_PER_QUERY):
                live |= live_progress(session, live_ids[first : first + _MAX_IDS_PER_QUERY])
        return snapshots, live

    async def _poll(self, state: _LoopState) -> None:
        unavailable = False
        try:
            while state.watched and not state.closing.is_set():
                try:
                    await self._join_query(state, state.watched.keys())
                    unavailable = False
                except DatabaseUnavailable as error:
                    # Changes are delivered late, and none is lost. Logged once an outage.
                    if not unavailable:
                        _log.warning("database_unavailable", error=str(error))
                    unavailable = True
                with suppress(TimeoutError):
                    await asyncio.wait_for(state.closing.wait(), self._poll_seconds)
        finally:
            # Without a poller no change would be delivered any more: clients reconnect instead.
            _close_all(state)


def _close_all(state: _LoopState) -> None:
    for job in state.watched.values():
        for subscription in job.subscriptions:
            subscription.close()


@contextmanager
def closing_on_disconnect(receive: Receive, subscription: Subscription) -> Iterator[None]:
    """Close the subscription once the client disconnects."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        subscription.close()

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()


async def _get_watcher(request: Request) -> JobWatcher:
    watcher: JobWatcher = request.app.state.watcher
    return watcher


WatcherDep = Annotated[JobWatcher, Depends(_get_watcher)]
