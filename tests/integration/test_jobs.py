"""Jobs through real Celery workers, a real broker and both databases, with faults on the way."""

import signal
from pathlib import Path

import pytest
import redis

from domain.jobs.states import AttemptEnd, JobStatus
from domain.workers.repository import drain, list_workers
from tests.support.cluster import ClusterHarness, children_of, engines
from tests.support.harness import ServiceHarness, kill
from tests.support.waiting import eventually
from tests.worker.fake_engine import STEPS


def test_job_runs_to_success(cluster: ClusterHarness, gate: Path) -> None:
    gate.touch()
    job = cluster.harness.submit()
    cluster.start_scheduler()
    cluster.start_worker()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    assert cluster.harness.job(job).step == STEPS


@pytest.mark.short_lease
def test_job_of_a_killed_worker_is_continued_by_another_and_succeeds_once(cluster: ClusterHarness, gate: Path) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    first = cluster.start_worker()
    cluster.wait_for_step(job, 5)
    kill(first.pid)
    eventually(lambda: not engines(cluster.harness, job, 1), what="its engine is gone")
    gate.touch()
    cluster.start_worker()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    lost, last = cluster.harness.attempts(job)
    assert (lost.end, last.end, last.resumed_from_step) == (AttemptEnd.LOST, AttemptEnd.SUCCEEDED, 4)
    assert len(cluster.harness.events(job, "run_finished")) == 1
    assert cluster.harness.status_history(job).count("succeeded") == 1


def test_worker_that_gets_sigterm_saves_and_releases_its_job(cluster: ClusterHarness, gate: Path) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    first = cluster.start_worker()
    cluster.wait_for_step(job, 5)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait_for_exit() == 0
    assert cluster.harness.job(job).status is JobStatus.QUEUED
    assert cluster.harness.job(job).attempts_spent == 0
    gate.touch()
    cluster.start_worker()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    released, last = cluster.harness.attempts(job)
    assert (released.end, last.resumed_from_step) == (AttemptEnd.RELEASED, 5)


def test_running_job_is_cancelled_and_the_worker_takes_the_next(cluster: ClusterHarness, gate: Path) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    cluster.start_worker()
    cluster.wait_for_step(job, 5)
    cluster.harness.cancel(job)
    cluster.wait_for_status(job, JobStatus.CANCELLED)
    assert not engines(cluster.harness, job, 1)
    gate.touch()
    other = cluster.harness.submit()
    cluster.wait_for_status(other, JobStatus.SUCCEEDED)


def test_emptied_broker_only_delays_jobs(cluster: ClusterHarness, gate: Path) -> None:
    gate.touch()
    jobs = [cluster.harness.submit() for _ in range(2)]
    cluster.start_scheduler()
    eventually(lambda: cluster.doorbell.waiting() == 2, what="two rings")
    with redis.Redis.from_url(str(cluster.harness.redis_url)) as client:
        client.flushall()
    cluster.start_worker()
    for job in jobs:
        cluster.wait_for_status(job, JobStatus.SUCCEEDED)


def test_many_rings_for_one_job_make_one_attempt(cluster: ClusterHarness, gate: Path) -> None:
    gate.touch()
    job = cluster.harness.submit()
    for _ in range(4):
        cluster.doorbell.ring()
    workers = [cluster.start_worker(), cluster.start_worker()]
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    eventually(lambda: cluster.doorbell.waiting() == 0, what="all rings are taken")
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait_for_exit() == 0
    assert [attempt.end for attempt in cluster.harness.attempts(job)] == [AttemptEnd.SUCCEEDED]


@pytest.mark.short_lease
def test_worker_frozen_past_its_lease_changes_nothing(cluster: ClusterHarness, gate: Path) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    first = cluster.start_worker()
    cluster.wait_for_step(job, 5)
    frozen = [first.pid, *children_of(first.pid)]
    cluster.freeze(frozen)
    cluster.start_worker()
    eventually(lambda: engines(cluster.harness, job, 2), within=60, what="the second attempt")
    for process in frozen:
        kill(process, signal.SIGCONT)
    eventually(lambda: not engines(cluster.harness, job, 1), what="the first engine is gone")
    gate.touch()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    assert [attempt.end for attempt in cluster.harness.attempts(job)] == [AttemptEnd.LOST, AttemptEnd.SUCCEEDED]
    assert {c.attempt for c in cluster.harness.checkpoints(job) if c.step > 5} == {2}


# --- Registration of workers ------------------------------------------------------------------------------


def registered_workers(harness: ServiceHarness) -> list[str]:
    with harness.database.transaction(write=False) as session:
        return [worker.name for worker in list_workers(session, limit=10).rows]


def test_worker_is_registered_while_it_runs(cluster: ClusterHarness) -> None:
    worker = cluster.start_worker()
    (name,) = eventually(lambda: registered_workers(cluster.harness), within=60, what="the worker's row")
    assert name.endswith(f"-{worker.pid}")
    kill(worker.pid, signal.SIGTERM)
    assert worker.wait_for_exit() == 0
    assert registered_workers(cluster.harness) == []


def test_drained_worker_releases_its_job_to_another(cluster: ClusterHarness, gate: Path) -> None:
    job = cluster.harness.submit()
    cluster.start_scheduler()
    cluster.start_worker()
    cluster.wait_for_step(job, 5)
    (first,) = registered_workers(cluster.harness)
    with cluster.harness.database.transaction(write=True) as session:
        drain(session, first, "release")
    cluster.wait_for_status(job, JobStatus.QUEUED)
    gate.touch()
    cluster.start_worker()
    cluster.wait_for_status(job, JobStatus.SUCCEEDED)
    attempts = cluster.harness.attempts(job)
    assert [attempt.end for attempt in attempts] == [AttemptEnd.RELEASED, AttemptEnd.SUCCEEDED]
    assert attempts[0].worker == first != attempts[1].worker
    assert cluster.harness.job(job).attempts_spent == 1
