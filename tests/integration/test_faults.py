"""Faults of the processes of one machine: whatever fails meanwhile, an accepted job succeeds once."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from domain.connections import create_engine_for
from domain.jobs.states import AttemptEnd, JobStatus
from domain.workers.repository import list_schedulers
from tests.support.cluster import ClusterHarness, children_of, engines
from tests.support.harness import kill
from tests.support.processes import terminal_signals
from tests.support.waiting import eventually
from tests.worker.fake_engine import STEPS

Fault = Callable[[ClusterHarness], AbstractContextManager[object]]


def broker(cluster: ClusterHarness) -> redis.Redis:
    return redis.Redis.from_url(str(cluster.harness.redis_url))


@contextmanager
def broker_is_frozen(cluster: ClusterHarness) -> Iterator[None]:
    with broker(cluster) as client:
        process = int(client.info()["process_id"])
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextmanager
def broker_is_full(cluster: ClusterHarness) -> Iterator[None]:
    with broker(cluster) as client:
        client.config_set("maxmemory", "1")
        try:
            yield
        finally:
            client.config_set("maxmemory", "0")


def connections_are_cut(cluster: ClusterHarness) -> AbstractContextManager[object]:
    with broker(cluster) as client:
        for _ in range(3):
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)
    return nullcontext()


@contextmanager
def database_is_unavailable(cluster: ClusterHarness) -> Iterator[None]:
    """Cut every connection and refuse new ones, as while a server restarts."""
    url = sa.make_url(cluster.harness.database_url)
    if url.get_backend_name() == "sqlite":
        # A file cannot refuse connections; the nearest fault is a lock.
        with database_is_locked(cluster):
            yield
        return
    with database_is_altered(url, "ALLOW_CONNECTIONS false", "ALLOW_CONNECTIONS true"):
        yield


@contextmanager
def database_takes_no_writes(cluster: ClusterHarness) -> Iterator[None]:
    """Answer reads alone, as a standby does after a failover."""
    url = sa.make_url(cluster.harness.database_url)
    if url.get_backend_name() == "sqlite":
        # A file has no standby.
        with database_is_locked(cluster):
            yield
        return
    setting = "default_transaction_read_only"
    with database_is_altered(url, f"SET {setting} = on", f"RESET {setting}"):
        yield


@contextmanager
def database_is_altered(url: sa.URL, how: str, back: str) -> Iterator[None]:
    """Alter a database of PostgreSQL, and cut every connection then and at the end, so that new ones have it so."""
    server = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    cut = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
    with server.connect() as connection:
        connection.execute(sa.text(f'ALTER DATABASE "{url.database}" {how}'))
        try:
            connection.execute(cut, {"name": url.database})
            yield
        finally:
            connection.execute(sa.text(f'ALTER DATABASE "{url.database}" {back}'))
            connection.execute(cut, {"name": url.database})
    server.dispose()


@contextmanager
def database_is_locked(cluster: ClusterHarness) -> Iterator[None]:
    """Hold the lock that every writer needs."""
    engine = create_engine_for(cluster.harness.database_url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        yield
    engine.dispose()


SLOW = pytest.mark.slow


@pytest.mark.short_lease
@pytest.mark.parametrize(
    "fault",
    [
        broker_is_frozen,
        database_takes_no_writes,
        pytest.param(database_is_unavailable, marks=SLOW),
        pytest.param(broker_is_full, marks=SLOW),
        pytest.param(connections_are_cut, marks=SLOW),
        pytest.param(database_is_locked, marks=SLOW),
    ],
    ids=lambda fault: fault.__name__,
)
def test_job_survives_a_fault_of_the_broker_or_the_database(cluster: ClusterHarness, gate: Path, fault: Fault) -> None:
    job = cluster.harness.submit()
    started = [cluster.start_scheduler(), cluster.start_worker()]
    cluster.wait_for_step(job, 5)
    with fault(cluster):
        # The engine needs neither: it finishes, and the worker then waits until both are back.
        gate.touch()
        eventually(lambda: not engines(cluster.harness, job, 1), within=60, what="the engine ends")
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    assert cluster.harness.job(job).step == STEPS
    assert [attempt.end for attempt in cluster.harness.attempts(job)][-1] is AttemptEnd.SUCCEEDED
    assert cluster.harness.status_history(job).count("succeeded") == 1
    # The next job is not affected.
    other = cluster.harness.submit()
    cluster.wait_for_status(other, JobStatus.SUCCEEDED)
    if fault is not broker_is_full:
        # Celery ends where its broker refuses everything, and is started again by whatever runs it.
        assert [process.process.poll() for process in started] == [None, None]


@pytest.mark.short_lease
def test_attempt_outlives_a_database_that_is_away_for_longer_than_its_lease(
    cluster: ClusterHarness, gate: Path
) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    worker = cluster.start_worker()
    cluster.wait_for_step(job, 5)
    engine = engines(cluster.harness, job, 1)
    with database_is_unavailable(cluster):
        away_until = time.monotonic() + 2.5 * cluster.harness.lease_seconds
        eventually(lambda: time.monotonic() > away_until, what="several leases have passed")
        assert engines(cluster.harness, job, 1) == engine
    # Nobody asks the engine to go on before a heartbeat has found the job still its own.
    renewed = cluster.harness.job(job).lease_expires_at
    eventually(lambda: cluster.harness.job(job).lease_expires_at != renewed, what="the lease is renewed")
    gate.touch()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    (attempt,) = cluster.harness.attempts(job)
    assert attempt.end is AttemptEnd.SUCCEEDED
    assert cluster.harness.job(job).attempts_spent == 1
    # Each event of the engine is there once.
    assert [len(cluster.harness.events(job, kind)) for kind in ("stage_started", "run_finished")] == [2, 1]
    if cluster.harness.database.engine.dialect.name == "postgresql":
        # A lock on SQLite is waited for; this database refused.
        reasons = [event.data["reason"] for event in cluster.harness.events(job, "lease_resumed")]
        assert reasons == ["database_unavailable"]
    assert worker.process.poll() is None


def test_terminal_costs_a_worker_that_ignores_it_nothing(cluster: ClusterHarness, gate: Path) -> None:
    job = cluster.harness.submit()
    with terminal_signals(signal.SIG_IGN):
        started = [cluster.start_scheduler(), cluster.start_worker()]
    cluster.wait_for_step(job, 5)
    for process in started:
        for pid in (process.pid, *children_of(process.pid)):
            kill(pid, signal.SIGHUP)
            kill(pid, signal.SIGINT)
    gate.touch()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    assert [attempt.end for attempt in cluster.harness.attempts(job)] == [AttemptEnd.SUCCEEDED]
    assert [process.process.poll() for process in started] == [None, None]


@pytest.mark.short_lease
def test_killed_pool_child_costs_an_attempt_and_no_job(cluster: ClusterHarness, gate: Path) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    worker = cluster.start_worker()
    cluster.wait_for_step(job, 5)
    (engine,) = engines(cluster.harness, job, 1)
    (child,) = (each for each in children_of(worker.pid) if engine in children_of(each))
    gate.touch()
    kill(child)
    eventually(lambda: not engines(cluster.harness, job, 1), within=10, what="the engine dies with it")
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    assert worker.process.poll() is None
    assert [attempt.end for attempt in cluster.harness.attempts(job)] == [AttemptEnd.LOST, AttemptEnd.SUCCEEDED]


@SLOW
@pytest.mark.short_lease
@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT,)], ids=["twice", "quit"])
def test_job_continues_however_its_worker_is_stopped(
    cluster: ClusterHarness, gate: Path, signals: tuple[signal.Signals, ...]
) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    worker = cluster.start_worker()
    cluster.wait_for_step(job, 5)
    for number in signals:
        kill(worker.pid, number)
    worker.wait_for_exit()
    eventually(lambda: not engines(cluster.harness, job, 1), within=10, what="no engine is left")
    gate.touch()
    cluster.start_worker()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    assert [attempt.end for attempt in cluster.harness.attempts(job)][-1] is AttemptEnd.SUCCEEDED


@SLOW
def test_two_schedulers_run_each_job_once(cluster: ClusterHarness, gate: Path) -> None:
    gate.touch()
    jobs = [cluster.harness.submit() for _ in range(3)]
    for _ in range(2):
        cluster.start_scheduler()
    workers = [cluster.start_worker(), cluster.start_worker()]
    for job in jobs:
        cluster.wait_for_status(job, JobStatus.SUCCEEDED)
        assert len(cluster.harness.attempts(job)) == 1
    assert all(worker.process.poll() is None for worker in workers)


@SLOW
def test_frozen_leader_is_replaced_and_does_nothing_more_when_it_wakes(cluster: ClusterHarness, gate: Path) -> None:
    gate.touch()
    database = cluster.harness.database

    def leader() -> int:
        with database.transaction(write=False) as session:
            leading = [each.name for each in list_schedulers(session, limit=10).rows if each.leads]
        return int(leading[0].rpartition("-")[2]) if leading else 0

    def run_a_job() -> None:
        job = cluster.harness.submit()
        cluster.wait_for_status(job, JobStatus.SUCCEEDED)
        assert len(cluster.harness.attempts(job)) == 1

    cluster.start_worker()
    pids = {cluster.start_scheduler().pid for _ in range(2)}
    run_a_job()
    frozen = eventually(leader, within=60, what="one leads")
    assert frozen in pids
    cluster.freeze([frozen])
    (other,) = pids - {frozen}
    eventually(lambda: leader() == other, within=60, what="the other leads")
    run_a_job()
    kill(frozen, signal.SIGCONT)
    run_a_job()
    eventually(lambda: leader() in pids, within=60, what="one leads")


@SLOW
def test_another_scheduler_takes_over_from_a_killed_one(cluster: ClusterHarness, gate: Path) -> None:
    gate.touch()
    kill(cluster.start_scheduler().pid)
    job = cluster.harness.submit()
    cluster.start_worker()
    cluster.start_scheduler()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
