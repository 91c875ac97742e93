"""Snapshots of jobs and subscriptions to them: queries are shared and never stale, and a wait holds nothing."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from api.jobs.watcher import JobWatcher, Subscription, TooManyFollowers
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.jobs.leases import claim_next
from domain.jobs.live_progress import LiveProgress
from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, queue_position
from domain.jobs.snapshot import JobSnapshot, job_snapshots
from domain.jobs.states import JobStatus
from tests.support.rows import add_job, set_status
from tests.support.watchers import recorded_queries, run_and_close

SHORT_POLL, NEVER_POLL, LONG = 0.001, 3600.0, 60.0


def make_watcher(database: Database, poll_seconds: float = SHORT_POLL, max_followers: int = 1000) -> JobWatcher:
    return JobWatcher(database, poll_seconds=poll_seconds, max_followers=max_followers, worker_seconds=60)


def add_queued_job(database: Database, **columns: Any) -> str:
    with database.transaction(write=True) as session:
        return add_job(session, **columns).id


def claim_job(database: Database) -> None:
    with database.transaction(write=True) as session:
        assert claim_next(session, worker="w", lease_seconds=600) is not None


def read_snapshot(database: Database, job_id: str) -> JobSnapshot:
    with database.transaction(write=False) as session:
        return job_snapshots(session, [job_id], worker_seconds=60)[job_id]


async def changes(subscription: Subscription, known: JobSnapshot | None) -> bool:
    return await subscription.wait_for(lambda latest: latest != known, timeout=LONG)


def test_snapshots_match_the_rows(database: Database) -> None:
    with database.transaction(write=True) as session:
        jobs = [add_job(session, priority=priority) for priority in (0, 5, 5, 1)]
        ended = add_job(session, event_seq=7, version=3)
        set_status(session, ended.id, JobStatus.FAILED)
    with database.transaction(write=False) as session:
        snapshots = job_snapshots(session, [*(job.id for job in jobs), ended.id, "job_unknown0"], worker_seconds=60)
        for job in jobs:
            position = queue_position(session, job, worker_seconds=60)
            assert position is not None
            assert snapshots.pop(job.id) == JobSnapshot("default", 1, 0, False, position)
    assert snapshots == {ended.id: JobSnapshot("default", 3, 7, True, None)}


def test_concurrent_requests_share_a_query(database: Database) -> None:
    jobs = [add_queued_job(database) for _ in range(3)]
    watcher = make_watcher(database)

    async def request() -> list[JobSnapshot | None]:
        return await asyncio.gather(*(watcher.snapshot(jobs[n % 3]) for n in range(300)))

    with recorded_queries(database) as queries_of_one:
        run_and_close(watcher.snapshot(jobs[2]), watcher)
    with recorded_queries(database) as queries:
        snapshots = run_and_close(request(), watcher)
    assert len(queries) == len(queries_of_one)
    positions = [each.queue_position for each in snapshots if each is not None]
    assert {position.ahead for position in positions if position is not None} == {0, 1, 2}


class PausedWatcher(JobWatcher):
    """A watcher that holds back what it read until it is resumed."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, poll_seconds=NEVER_POLL, max_followers=10, worker_seconds=60)
        self.read_done, self.resume = threading.Event(), threading.Event()

    def _read_snapshots(
        self, job_ids: list[str], live_ids: list[str]
    ) -> tuple[dict[str, JobSnapshot], dict[str, LiveProgress]]:
        read = super()._read_snapshots(job_ids, live_ids)
        self.read_done.set()
        assert self.resume.wait(30)
        return read


def test_a_snapshot_is_never_older_than_its_request(database: Database) -> None:
    job_id = add_queued_job(database)
    watcher = PausedWatcher(database)

    async def request_before_and_after_a_change() -> tuple[JobSnapshot | None, JobSnapshot | None]:
        before = asyncio.create_task(watcher.snapshot(job_id))
        await asyncio.to_thread(watcher.read_done.wait, 30)
        claim_job(database)
        after = asyncio.create_task(watcher.snapshot(job_id))
        await asyncio.sleep(0)
        watcher.resume.set()
        return await before, await after

    before, after = run_and_close(request_before_and_after_a_change(), watcher)
    assert before is not None
    assert after is not None
    assert (before.version, after.version) == (1, 2)


def test_a_cancelled_request_cancels_no_shared_query(database: Database) -> None:
    job_id = add_queued_job(database)
    watcher = PausedWatcher(database)

    async def cancel_one() -> JobSnapshot | None:
        first, second = (asyncio.create_task(watcher.snapshot(job_id)) for _ in range(2))
        await asyncio.to_thread(watcher.read_done.wait, 30)
        first.cancel()
        watcher.resume.set()
        return await second

    assert run_and_close(cancel_one(), watcher) == read_snapshot(database, job_id)


def test_hundreds_of_subscriptions_hold_no_connection_and_no_thread(database: Database) -> None:
    job_id = add_queued_job(database)
    watcher = make_watcher(database, poll_seconds=NEVER_POLL)

    async def wait() -> tuple[list[bool], int, int]:
        known = await watcher.snapshot(job_id)
        threads = threading.active_count()
        with ExitStack() as stack:
            subscriptions = [stack.enter_context(watcher.subscribe(job_id, client="")) for _ in range(300)]
            waiting = [asyncio.create_task(changes(subscription, known)) for subscription in subscriptions]
            # Queries run one after the other: once this one has ended, so has the poller's first.
            await watcher.snapshot(job_id)
            connections = database.engine.pool.checkedout()  # type: ignore[attr-defined] # Both databases have a QueuePool.
            new_threads = threading.active_count() - threads
            await asyncio.to_thread(claim_job, database)
            await watcher.snapshot(job_id)
            return await asyncio.gather(*waiting), connections, new_threads

    changed, connections, new_threads = run_and_close(wait(), watcher)
    assert changed == [True] * 300
    assert (connections, new_threads) == (0, 0)
    assert has_no_subscription(watcher)


def has_no_subscription(watcher: JobWatcher) -> bool:
    async def count() -> int:
        return watcher.subscriptions

    return run_and_close(count(), watcher) == 0


def test_all_watched_jobs_are_polled_with_one_query(database: Database) -> None:
    jobs = [add_queued_job(database) for _ in range(40)]
    watcher = make_watcher(database, poll_seconds=NEVER_POLL)

    async def follow() -> list[JobSnapshot | None]:
        with recorded_queries(database) as queries_of_one:
            await watcher.snapshot(jobs[0])
        with ExitStack() as stack, recorded_queries(database) as queries:
            subscriptions = [stack.enter_context(watcher.subscribe(job_id, client="")) for job_id in jobs]
            first_polls = [subscription.wait_for(lambda _: True, timeout=LONG) for subscription in subscriptions]
            await asyncio.gather(*first_polls)
        # For 40 jobs as for one; what is used again for a while may be read anew in either of them.
        assert len(queries) < 2 * len(queries_of_one)
        return [subscription.latest for subscription in subscriptions]

    assert run_and_close(follow(), watcher) == [read_snapshot(database, job_id) for job_id in jobs]


def test_a_change_by_another_process_is_delivered_at_the_next_poll(database: Database, database_url: str) -> None:
    first, second = add_queued_job(database), add_queued_job(database)
    other_process = Database(database_url)
    watcher = make_watcher(database)

    async def follow() -> list[bool]:
        known = [await watcher.snapshot(first), await watcher.snapshot(second)]
        with watcher.subscribe(first, client="") as one, watcher.subscribe(second, client="") as two:
            waiting = [
                asyncio.create_task(changes(subscription, was))
                for subscription, was in zip((one, two), known, strict=True)
            ]
            await asyncio.to_thread(claim_job, other_process)
            delivered = await asyncio.gather(*waiting)
            # The second job's row did not change: the job moved up in the queue.
            assert two.latest == JobSnapshot("default", 1, 0, False, QueuePosition(1, 0, "no_worker", None))
            return delivered

    assert run_and_close(follow(), watcher) == [True, True]
    other_process.close()


def test_a_deletion_is_delivered(database: Database) -> None:
    job_id = add_queued_job(database)
    watcher = make_watcher(database)

    def delete() -> None:
        with database.transaction(write=True) as session:
            session.execute(sa.delete(Job).where(Job.id == job_id))

    async def follow() -> JobSnapshot | None:
        known = await watcher.snapshot(job_id)
        with watcher.subscribe(job_id, client="") as subscription:
            waiting = asyncio.create_task(changes(subscription, known))
            await asyncio.to_thread(delete)
            assert await waiting
            return subscription.latest

    assert run_and_close(follow(), watcher) is None


def test_waiting_ends_at_its_timeout_and_with_the_service(database: Database) -> None:
    job_id = add_queued_job(database)
    watcher = make_watcher(database)

    async def follow() -> tuple[bool, bool, bool]:
        known = await watcher.snapshot(job_id)
        with watcher.subscribe(job_id, client="") as subscription:
            timed_out = await subscription.wait_for(lambda latest: latest != known, timeout=0.01)
            waiting = asyncio.create_task(changes(subscription, known))
            await asyncio.sleep(0)
            watcher.close()
            closed = await waiting
        with watcher.subscribe(job_id, client="") as late:
            return timed_out, closed, await changes(late, known)

    assert run_and_close(follow(), watcher) == (False, False, False)


def test_subscriptions_are_limited_and_freed(database: Database) -> None:
    job_id = add_queued_job(database)
    watcher = make_watcher(database, max_followers=2)

    async def subscribe_thrice() -> None:
        for _ in range(3):
            with (
                watcher.subscribe(job_id, client="one"),
                watcher.subscribe(job_id, client="another"),
                pytest.raises(TooManyFollowers),
                watcher.subscribe(job_id, client="a third"),
            ):
                pass

    run_and_close(subscribe_thrice(), watcher)
    assert has_no_subscription(watcher)


class UnavailableDatabase(Database):
    """A database that cannot be reached for the next `failures` transactions."""

    failures = 0

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Session]:
        if self.failures:
            self.failures -= 1
            raise DatabaseUnavailable
        with super().transaction(write=write) as session:
            yield session


def test_subscriptions_outlast_an_unavailable_database(database: Database, database_url: str) -> None:
    job_id = add_queued_job(database)
    failing = UnavailableDatabase(database_url)
    watcher = make_watcher(failing)

    async def follow() -> Mapping[str, Any]:
        known = await watcher.snapshot(job_id)
        failing.failures = 3
        with watcher.subscribe(job_id, client="") as subscription:
            waiting = asyncio.create_task(changes(subscription, known))
            await asyncio.to_thread(claim_job, database)
            return {"changed": await waiting, "failures": failing.failures}

    assert run_and_close(follow(), watcher) == {"changed": True, "failures": 0}
    failing.close()


def test_a_snapshot_of_an_unavailable_database_raises(database: Database, database_url: str) -> None:
    job_id = add_queued_job(database)
    failing = UnavailableDatabase(database_url)
    failing.failures = 1
    watcher = make_watcher(failing)

    async def request() -> JobSnapshot | None:
        with pytest.raises(DatabaseUnavailable):
            await watcher.snapshot(job_id)
        return await watcher.snapshot(job_id)

    assert run_and_close(request(), watcher) == read_snapshot(database, job_id)
    failing.close()
