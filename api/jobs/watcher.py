"""What state jobs are in, asked of the database once for all who want to know.

Requests that arrive while a query runs share the next one. Those that wait for a change hold neither a
connection nor a thread: one task of the process asks for all their jobs in one query per tick.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import structlog
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync
from starlette.types import Receive

from domain.db import DATABASE_UNAVAILABLE, Database
from domain.errors import Unavailable
from domain.jobs.snapshot import JobSnapshot, job_snapshots

_MAX_IDS_PER_QUERY: Final = 10_000
"""Jobs of one statement: databases bound its parameters."""

_log = structlog.get_logger(__name__)


class TooManyFollowers(Unavailable):
    """As many clients wait for news of jobs as this process can serve: poll without `wait`, or try again later."""

    code = "too_many_followers"


class Subscription:
    """One who waits for a job to change."""

    def __init__(self, job: "_WatchedJob") -> None:
        self._job = job
        self._waiter: asyncio.Future[None] | None = None
        self._time_is_up = False
        self.closed = False
        """Nobody is to be told any more: the client has gone, or the service stops."""

    @property
    def latest(self) -> JobSnapshot | None:
        """The job as it was seen last; null where it is gone, or was not looked at yet."""
        return self._job.latest

    async def wait_for(self, wanted: Callable[[JobSnapshot | None], bool], *, within: float) -> bool:
        """Wait until the job is seen in a state that is `wanted`. False after `within` seconds, or once it is over."""
        self._time_is_up = False
        loop = asyncio.get_running_loop()
        timer = loop.call_later(within, self._expire)
        try:
            while not (self._has(wanted) or self.closed or self._time_is_up):
                self._waiter = loop.create_future()
                await self._waiter
        finally:
            timer.cancel()
            self._waiter = None
        return self._has(wanted)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self) -> None:
        """Wait no longer, now and later."""
        self.closed = True
        self.wake()

    def _has(self, wanted: Callable[[JobSnapshot | None], bool]) -> bool:
        return self._job.looked_at and wanted(self._job.latest)

    def _expire(self) -> None:
        self._time_is_up = True
        self.wake()


@dataclass
class _WatchedJob:
    followers: set[Subscription] = field(default_factory=set)
    looked_at: bool = False
    latest: JobSnapshot | None = None


@dataclass
class _QueryBatch:
    jobs: set[str] = field(default_factory=set)
    task: "asyncio.Task[Mapping[str, JobSnapshot]] | None" = None


@dataclass
class _LoopState:
    """What belongs to one event loop."""

    watched: dict[str, _WatchedJob] = field(default_factory=dict)
    gathering: _QueryBatch | None = None
    """Whose query has not begun."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    """A thread of its own: requests that wait for a lock do not take it."""
    ticker: "asyncio.Task[None] | None" = None
    followers: int = 0
    closing: asyncio.Event = field(default_factory=asyncio.Event)


class JobWatcher:
    """The one who asks for the state of jobs, in one process.

    Args:
        poll_seconds: time between two looks at the jobs that are followed.
        max_followers: beyond this many :meth:`subscribe` refuses.
        worker_seconds: a worker that was not heard of for longer does not count in the queue.
    """

    def __init__(self, database: Database, *, poll_seconds: float, max_followers: int, worker_seconds: float) -> None:
        self._database = database
        self._tick_seconds = poll_seconds
        self._most_followers = max_followers
        self._worker_seconds = worker_seconds
        self._run: RunVar[_LoopState] = RunVar("watch")

    async def snapshot(self, job_id: str) -> JobSnapshot | None:
        """The job as it is now: the query begins after this call. Null where there is none.

        Raises:
            sqlalchemy.exc.OperationalError: the database cannot be reached.
        """
        return (await self._ask(self._here(), (job_id,))).get(job_id)

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """Look at a job at every tick for as long as the block lasts.

        Raises:
            TooManyFollowers
        """
        here = self._here()
        if here.followers >= self._most_followers:
            raise TooManyFollowers
        watched = here.watched.setdefault(job_id, _WatchedJob())
        follower = Subscription(watched)
        follower.closed = here.closing.is_set()
        watched.followers.add(follower)
        here.followers += 1
        if here.ticker is None or here.ticker.done():
            here.ticker = asyncio.create_task(self._tick(here))
        try:
            yield follower
        finally:
            here.followers -= 1
            watched.followers.discard(follower)
            if not watched.followers:
                del here.watched[job_id]

    @property
    def followers(self) -> int:
        return self._here().followers

    def close(self) -> None:
        """The service stops: nobody waits any longer. To be called from the event loop."""
        here = self._here()
        here.closing.set()
        _end_all(here)

    async def aclose(self) -> None:
        """Close, and wait until nothing is asked of the database any more."""
        self.close()
        here = self._here()
        if here.ticker is not None:
            await asyncio.wait([here.ticker])

    def _here(self) -> _LoopState:
        here = self._run.get(None)
        if here is None:
            here = _LoopState()
            self._run.set(here)
        return here

    async def _ask(self, here: _LoopState, jobs: Collection[str]) -> Mapping[str, JobSnapshot]:
        batch = here.gathering
        if batch is None:
            batch = here.gathering = _QueryBatch()
            batch.task = asyncio.create_task(self._answer(here, batch))
        batch.jobs.update(jobs)
        assert batch.task is not None
        # A request whose client goes away takes the answer from nobody else.
        return await asyncio.shield(batch.task)

    async def _answer(self, here: _LoopState, batch: _QueryBatch) -> Mapping[str, JobSnapshot]:
        # One after the other, so what is found is never older than what was found before.
        async with here.turn:
            here.gathering = None
            found = await run_sync(self._query, sorted(batch.jobs), limiter=here.limiter)
            for job_id in batch.jobs & here.watched.keys():
                watched = here.watched[job_id]
                before, watched.latest = watched.latest, found.get(job_id)
                if not watched.looked_at or watched.latest != before:
                    watched.looked_at = True
                    for follower in watched.followers:
                        follower.wake()
        return found

    def _query(self, jobs: list[str]) -> dict[str, JobSnapshot]:
        found: dict[str, JobSnapshot] = {}
        with self._database.transaction(write=False) as session:
            for first in range(0, len(jobs), _MAX_IDS_PER_QUERY):
                some = jobs[first : first + _MAX_IDS_PER_QUERY]
                found |= job_snapshots(session, some, worker_seconds=self._worker_seconds)
        return found

    async def _tick(self, here: _LoopState) -> None:
        away = False
        try:
            while here.watched and not here.closing.is_set():
                try:
                    await self._ask(here, here.watched.keys())
                    away = False
                except DATABASE_UNAVAILABLE as error:
                    # Those who wait are told late, and miss nothing.
                    if not away:
                        _log.warning("database_unavailable", error=type(error).__name__)
                    away = True
                with suppress(TimeoutError):
                    await asyncio.wait_for(here.closing.wait(), self._tick_seconds)
        finally:
            # Were it to fail, nobody would be told of anything any more: better that they ask again.
            _end_all(here)


def _end_all(here: _LoopState) -> None:
    for watched in here.watched.values():
        for follower in watched.followers:
            follower.end()


@contextmanager
def closing_on_disconnect(receive: Receive, follower: Subscription) -> Iterator[None]:
    """End the following once the client goes away."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        follower.end()

    listening = asyncio.create_task(listen())
    try:
        yield
    finally:
        listening.cancel()
