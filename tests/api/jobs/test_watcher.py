"""Asking for the state of jobs: once for all, never too late, and without holding anything meanwhile."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.jobs.watcher import JobWatcher, Subscription, TooManyFollowers
from domain.db import Database
from domain.jobs.leases import claim_next
from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, queue_position
from domain.jobs.snapshot import JobSnapshot, job_snapshots
from domain.jobs.states import JobStatus
from tests.support.rows import add_job, set_status

Result = TypeVar("Result")

OFTEN, SELDOM, LONG = 0.001, 3600.0, 60.0


def make_watcher(database: Database, poll_seconds: float = OFTEN, max_followers: int = 1000) -> JobWatcher:
    return JobWatcher(database, poll_seconds=poll_seconds, max_followers=max_followers, worker_seconds=60)


def queued(database: Database, **columns: Any) -> str:
    with database.transaction(write=True) as session:
        return add_job(session, **columns).id


def claim(database: Database) -> None:
    with database.transaction(write=True) as session:
        assert claim_next(session, worker="w", lease_seconds=600) is not None


def seen(database: Database, job_id: str) -> JobSnapshot:
    with database.transaction(write=False) as session:
        return job_snapshots(session, [job_id], worker_seconds=60)[job_id]


@contextmanager
def counted(database: Database) -> Iterator[list[str]]:
    """The queries that are sent meanwhile."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT"):
            sent.append(statement)

    sa.event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sa.event.remove(database.engine, "before_cursor_execute", note)


def run(what: Coroutine[Any, Any, Result], *watches: JobWatcher) -> Result:
    """As a service does it: to the end, and until no query is under way."""

    async def whole() -> Result:
        try:
            return await what
        finally:
            for watch in watches:
                await watch.aclose()

    return asyncio.run(whole())


async def differs(follower: Subscription, known: JobSnapshot | None) -> bool:
    return await follower.wait_for(lambda latest: latest != known, timeout=LONG)


def test_what_is_seen_is_what_the_rows_say(database: Database) -> None:
    with database.transaction(write=True) as session:
        jobs = [add_job(session, priority=priority) for priority in (0, 5, 5, 1)]
        ended = add_job(session, event_seq=7, version=3)
        set_status(session, ended.id, JobStatus.FAILED)
    with database.transaction(write=False) as session:
        found = job_snapshots(session, [*(job.id for job in jobs), ended.id, "job_unknown0"], worker_seconds=60)
        for job in jobs:
            place = queue_position(session, job, worker_seconds=60)
            assert place is not None
            assert found.pop(job.id) == JobSnapshot("default", 1, 0, False, place)
    assert found == {ended.id: JobSnapshot("default", 3, 7, True, None)}


def test_those_who_ask_at_once_share_a_query(database: Database) -> None:
    jobs = [queued(database) for _ in range(3)]
    watch = make_watcher(database)

    async def ask() -> list[JobSnapshot | None]:
        return await asyncio.gather(*(watch.snapshot(jobs[n % 3]) for n in range(300)))

    with counted(database) as alone:
        run(watch.snapshot(jobs[2]), watch)
    with counted(database) as sent:
        found = run(ask(), watch)
    assert len(sent) == len(alone)
    positions = [one.queue_position for one in found if one is not None]
    assert {position.ahead for position in positions if position is not None} == {0, 1, 2}


class Held(JobWatcher):
    """Reads, and keeps what it read until it is let go."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, poll_seconds=SELDOM, max_followers=10, worker_seconds=60)
        self.has_read, self.may_go_on = threading.Event(), threading.Event()

    def _read_snapshots(self, jobs: list[str]) -> dict[str, JobSnapshot]:
        found = super()._read_snapshots(jobs)
        self.has_read.set()
        assert self.may_go_on.wait(30)
        return found


def test_nobody_is_given_what_was_read_before_he_asked(database: Database) -> None:
    job_id = queued(database)
    watch = Held(database)

    async def ask_before_and_after_a_change() -> tuple[JobSnapshot | None, JobSnapshot | None]:
        before = asyncio.create_task(watch.snapshot(job_id))
        await asyncio.to_thread(watch.has_read.wait, 30)
        claim(database)
        after = asyncio.create_task(watch.snapshot(job_id))
        await asyncio.sleep(0)
        watch.may_go_on.set()
        return await before, await after

    before, after = run(ask_before_and_after_a_change(), watch)
    assert before is not None
    assert after is not None
    assert (before.version, after.version) == (1, 2)


def test_one_who_leaves_takes_the_answer_from_nobody(database: Database) -> None:
    job_id = queued(database)
    watch = Held(database)

    async def leave() -> JobSnapshot | None:
        leaving, staying = (asyncio.create_task(watch.snapshot(job_id)) for _ in range(2))
        await asyncio.to_thread(watch.has_read.wait, 30)
        leaving.cancel()
        watch.may_go_on.set()
        return await staying

    assert run(leave(), watch) == seen(database, job_id)


def test_hundreds_wait_and_hold_no_connection_and_no_thread(database: Database) -> None:
    job_id = queued(database)
    watch = make_watcher(database, poll_seconds=SELDOM)

    async def wait() -> tuple[list[bool], int, int]:
        known = await watch.snapshot(job_id)
        threads = threading.active_count()
        with ExitStack() as stack:
            followers = [stack.enter_context(watch.subscribe(job_id)) for _ in range(300)]
            waiting = [asyncio.create_task(differs(follower, known)) for follower in followers]
            # The look that their coming set off has ended when a later one has.
            await watch.snapshot(job_id)
            held = database.engine.pool.checkedout()  # type: ignore[attr-defined] # Both databases have a QueuePool.
            more = threading.active_count() - threads
            await asyncio.to_thread(claim, database)
            await watch.snapshot(job_id)
            return await asyncio.gather(*waiting), held, more

    woken, held, more = run(wait(), watch)
    assert woken == [True] * 300
    assert (held, more) == (0, 0)
    assert watch_is_empty(watch)


def watch_is_empty(watch: JobWatcher) -> bool:
    async def count() -> int:
        return watch.subscriptions

    return run(count(), watch) == 0


def test_all_jobs_are_asked_for_in_one_query_a_tick(database: Database) -> None:
    jobs = [queued(database) for _ in range(40)]
    watch = make_watcher(database, poll_seconds=SELDOM)

    async def follow() -> list[JobSnapshot | None]:
        with counted(database) as alone:
            await watch.snapshot(jobs[0])
        with ExitStack() as stack, counted(database) as sent:
            followers = [stack.enter_context(watch.subscribe(job_id)) for job_id in jobs]
            looked_at = [follower.wait_for(lambda _: True, timeout=LONG) for follower in followers]
            await asyncio.gather(*looked_at)
        assert len(sent) == len(alone)
        return [follower.latest for follower in followers]

    assert run(follow(), watch) == [seen(database, job_id) for job_id in jobs]


def test_a_change_by_anybody_wakes_at_the_next_tick(database: Database, database_url: str) -> None:
    first, second = queued(database), queued(database)
    elsewhere = Database(database_url)
    watch = make_watcher(database)

    async def follow() -> list[bool]:
        known = [await watch.snapshot(first), await watch.snapshot(second)]
        with watch.subscribe(first) as one, watch.subscribe(second) as two:
            waiting = [
                asyncio.create_task(differs(follower, was)) for follower, was in zip((one, two), known, strict=True)
            ]
            await asyncio.to_thread(claim, elsewhere)
            found = await asyncio.gather(*waiting)
            # The second one was not touched: it moved up.
            assert two.latest == JobSnapshot("default", 1, 0, False, QueuePosition(1, 0, "no_worker", None))
            return found

    assert run(follow(), watch) == [True, True]
    elsewhere.close()


def test_a_job_that_is_deleted_is_news(database: Database) -> None:
    job_id = queued(database)
    watch = make_watcher(database)

    def delete() -> None:
        with database.transaction(write=True) as session:
            session.execute(sa.delete(Job).where(Job.id == job_id))

    async def follow() -> JobSnapshot | None:
        known = await watch.snapshot(job_id)
        with watch.subscribe(job_id) as follower:
            waiting = asyncio.create_task(differs(follower, known))
            await asyncio.to_thread(delete)
            assert await waiting
            return follower.latest

    assert run(follow(), watch) is None


def test_waiting_ends_with_its_time_and_with_the_service(database: Database) -> None:
    job_id = queued(database)
    watch = make_watcher(database)

    async def follow() -> tuple[bool, bool, bool]:
        known = await watch.snapshot(job_id)
        with watch.subscribe(job_id) as follower:
            timed_out = await follower.wait_for(lambda latest: latest != known, timeout=0.01)
            waiting = asyncio.create_task(differs(follower, known))
            await asyncio.sleep(0)
            watch.close()
            closed = await waiting
        with watch.subscribe(job_id) as late:
            return timed_out, closed, await differs(late, known)

    assert run(follow(), watch) == (False, False, False)


def test_there_is_room_for_so_many_and_it_is_given_back(database: Database) -> None:
    job_id = queued(database)
    watch = make_watcher(database, max_followers=2)

    async def crowd() -> None:
        for _ in range(3):
            with (
                watch.subscribe(job_id),
                watch.subscribe(job_id),
                pytest.raises(TooManyFollowers),
                watch.subscribe(job_id),
            ):
                pass

    run(crowd(), watch)
    assert watch_is_empty(watch)


class Failing(Database):
    """Away for a while."""

    failures = 0

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Session]:
        if self.failures:
            self.failures -= 1
            raise OperationalError("SELECT", {}, Exception("away"))
        with super().transaction(write=write) as session:
            yield session


def test_those_who_wait_outlast_a_database_that_is_away(database: Database, database_url: str) -> None:
    job_id = queued(database)
    failing = Failing(database_url)
    watch = make_watcher(failing)

    async def follow() -> Mapping[str, Any]:
        known = await watch.snapshot(job_id)
        failing.failures = 3
        with watch.subscribe(job_id) as follower:
            waiting = asyncio.create_task(differs(follower, known))
            await asyncio.to_thread(claim, database)
            return {"woken": await waiting, "failures": failing.failures}

    assert run(follow(), watch) == {"woken": True, "failures": 0}
    failing.close()


def test_one_who_asks_while_the_database_is_away_is_told(database: Database, database_url: str) -> None:
    job_id = queued(database)
    failing = Failing(database_url)
    failing.failures = 1
    watch = make_watcher(failing)

    async def ask() -> JobSnapshot | None:
        with pytest.raises(OperationalError):
            await watch.snapshot(job_id)
        return await watch.snapshot(job_id)

    assert run(ask(), watch) == seen(database, job_id)
    failing.close()
