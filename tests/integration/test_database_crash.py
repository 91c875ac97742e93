"""A PostgreSQL server that crashes at any time, or stands still: commits survive, and each job ends once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from domain.jobs.states import AttemptEnd, JobStatus
from domain.schema import upgrade
from tests.support import servers
from tests.support.cluster import ClusterHarness, engines
from tests.support.harness import ServiceHarness
from tests.support.processes import Processes
from tests.support.waiting import eventually

_JOBS = 4


@pytest.fixture
def server() -> Iterator[str]:
    """A server for this module alone, since other tests must not see it crash."""
    elsewhere = {name: value for name, value in os.environ.items() if name != "TEST_DATABASE_URL"}
    with servers.running_postgres(servers.find_postgres(elsewhere), keeps_commits=True) as url:
        yield url


@pytest.fixture
def harness(server: str, redis_url: str, tmp_path: Path) -> Iterator[ServiceHarness]:
    with servers.fresh_database(server, "crashing") as url:
        harness = ServiceHarness(tmp_path / "home", url, lease_seconds=6, redis_url=redis_url)
        upgrade(harness.settings)
        yield harness
        harness.close()


def crash(server: str) -> None:
    """Kill a backend process and return once the server has dropped its connections and recovered from its log.

    The server notices the killed process a moment later, and answers until then. A second connection that stays open
    shows when the crash has really happened: the server closes it before it recovers.
    """
    engine = sa.create_engine(server, poolclass=sa.NullPool)
    with engine.connect() as witness, engine.connect() as connection:
        os.kill(connection.scalar(sa.select(sa.func.pg_backend_pid())) or 0, signal.SIGKILL)
        connection.invalidate()
        eventually(lambda: is_closed(witness), within=30, what="PostgreSQL drops its connections")
        witness.invalidate()
    eventually(lambda: servers.postgres_answers(server), within=30, what="PostgreSQL has recovered")


def is_closed(connection: sa.Connection) -> bool:
    try:
        connection.scalar(sa.select(1))
    except sa.exc.DBAPIError:
        return True
    return False


@contextmanager
def frozen(server: str) -> Iterator[None]:
    """Stop every process of the server. Its kernel goes on taking connections and what is sent over them."""
    lock_file = Path(str(sa.make_url(server).query["host"])) / "data" / "postmaster.pid"
    main = psutil.Process(int(lock_file.read_text().split()[0]))
    main.suspend()
    # No more are started now.
    processes = [main, *main.children(recursive=True)]
    for each in processes[1:]:
        each.suspend()
    try:
        yield
    finally:
        for each in reversed(processes):
            each.resume()


def has_no_engine(harness: ServiceHarness, job: str) -> bool:
    return not engines(harness, job, 1)


@pytest.mark.slow
def test_crashes_of_the_database_server_cost_no_job(
    server: str, harness: ServiceHarness, processes: Processes, queue: str, gate: Path
) -> None:
    cluster = ClusterHarness(harness, processes, queue, gate)
    jobs = [harness.submit() for _ in range(_JOBS)]
    cluster.start_scheduler()
    workers = [cluster.start_worker(), cluster.start_worker()]
    # While the workers start and claim.
    crash(server)
    eventually(lambda: any(harness.job(job).step >= 5 for job in jobs), within=60, what="an engine waits at step 5")
    # While the workers only send heartbeats.
    crash(server)
    gate.touch()
    for job in jobs:
        # While an attempt settles or a job is claimed.
        eventually(partial(has_no_engine, harness, job), within=60, what="the engine ends")
        crash(server)
    for job in jobs:
        cluster.wait_for_status(job, JobStatus.SUCCEEDED)
        assert harness.status_history(job).count("succeeded") == 1
        assert [attempt.end for attempt in harness.attempts(job)].count(AttemptEnd.SUCCEEDED) == 1
    assert all(worker.process.poll() is None for worker in workers)


@pytest.mark.slow
def test_attempt_outlives_a_database_that_stands_still_for_longer_than_its_lease(
    server: str, harness: ServiceHarness, processes: Processes, queue: str, gate: Path
) -> None:
    # Long enough for a busy machine to renew it while the database answers.
    harness = replace(harness, lease_seconds=8)
    cluster = ClusterHarness(harness, processes, queue, gate)
    job, waiting = harness.submit(), harness.submit()
    cluster.start_scheduler()
    worker = cluster.start_worker()
    cluster.wait_for_step(job, 5)
    engine = engines(harness, job, 1)
    renewed = harness.job(job).lease_expires_at
    with frozen(server):
        until = time.monotonic() + 2.5 * harness.lease_seconds
        eventually(lambda: time.monotonic() > until, what="several leases have passed")
        assert engines(harness, job, 1) == engine
    eventually(lambda: harness.job(job).lease_expires_at != renewed, within=60, what="the lease is renewed")
    gate.touch()
    for each in (job, waiting):
        cluster.wait_for_status(each, JobStatus.SUCCEEDED)
        assert [attempt.end for attempt in harness.attempts(each)] == [AttemptEnd.SUCCEEDED]
    assert worker.process.poll() is None
