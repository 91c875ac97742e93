"""Jobs through real Celery workers, a real broker and both databases, with faults on the way."""

import signal
from pathlib import Path

import redis

from domain.jobs.states import AttemptEnd, JobStatus
from domain.workers.repository import drain, list_workers
from tests.support.cluster import Shop, children_of, engines
from tests.support.harness import Workshop, kill
from tests.support.waiting import eventually
from tests.worker.fake_engine import STEPS


def test_a_job_is_run_to_its_end(shop: Shop, gate: Path) -> None:
    gate.touch()
    job = shop.workshop.submit()
    shop.scheduler()
    shop.worker()
    shop.becomes(job, JobStatus.SUCCEEDED)
    assert shop.workshop.job(job).step == STEPS


def test_after_the_whole_worker_is_killed_another_continues_and_the_job_succeeds_once(shop: Shop, gate: Path) -> None:
    job = shop.workshop.submit()
    shop.scheduler()
    first = shop.worker()
    shop.reaches(job, 5)
    kill(first.pid)
    eventually(lambda: not engines(shop.workshop, job, 1), what="its engine is gone")
    gate.touch()
    shop.worker()
    shop.becomes(job, JobStatus.SUCCEEDED)
    lost, last = shop.workshop.attempts(job)
    assert (lost.end, last.end, last.resumed_from_step) == (AttemptEnd.LOST, AttemptEnd.SUCCEEDED, 4)
    assert len(shop.workshop.events(job, "run_finished")) == 1
    assert shop.workshop.moves(job).count("succeeded") == 1


def test_a_worker_that_is_asked_to_end_saves_and_gives_the_job_back(shop: Shop, gate: Path) -> None:
    job = shop.workshop.submit()
    shop.scheduler()
    first = shop.worker()
    shop.reaches(job, 5)
    first.process.send_signal(signal.SIGTERM)
    assert first.ends() == 0
    assert shop.workshop.job(job).status is JobStatus.QUEUED
    assert shop.workshop.job(job).attempts_spent == 0
    gate.touch()
    shop.worker()
    shop.becomes(job, JobStatus.SUCCEEDED)
    released, last = shop.workshop.attempts(job)
    assert (released.end, last.resumed_from_step) == (AttemptEnd.RELEASED, 5)


def test_a_running_job_is_cancelled_and_the_worker_takes_the_next(shop: Shop, gate: Path) -> None:
    job = shop.workshop.submit()
    shop.scheduler()
    shop.worker()
    shop.reaches(job, 5)
    shop.workshop.cancel(job)
    shop.becomes(job, JobStatus.CANCELLED)
    assert not engines(shop.workshop, job, 1)
    gate.touch()
    other = shop.workshop.submit()
    shop.becomes(other, JobStatus.SUCCEEDED)


def test_a_broker_that_forgets_everything_only_delays(shop: Shop, gate: Path) -> None:
    gate.touch()
    jobs = [shop.workshop.submit() for _ in range(2)]
    shop.scheduler()
    eventually(lambda: shop.bell.waiting() == 2, what="two rings")
    with redis.Redis.from_url(str(shop.workshop.redis_url)) as client:
        client.flushall()
    shop.worker()
    for job in jobs:
        shop.becomes(job, JobStatus.SUCCEEDED)


def test_many_rings_for_one_job_make_one_attempt(shop: Shop, gate: Path) -> None:
    gate.touch()
    job = shop.workshop.submit()
    for _ in range(4):
        shop.bell.ring()
    workers = [shop.worker(), shop.worker()]
    shop.becomes(job, JobStatus.SUCCEEDED)
    eventually(lambda: shop.bell.waiting() == 0, what="all rings are heard")
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
        assert worker.ends() == 0
    assert [attempt.end for attempt in shop.workshop.attempts(job)] == [AttemptEnd.SUCCEEDED]


def test_a_worker_that_was_frozen_past_its_lease_changes_nothing(shop: Shop, gate: Path) -> None:
    job = shop.workshop.submit()
    shop.scheduler()
    first = shop.worker()
    shop.reaches(job, 5)
    mine = [first.pid, *children_of(first.pid)]
    for process in mine:
        kill(process, signal.SIGSTOP)
    shop.worker()
    eventually(lambda: engines(shop.workshop, job, 2), within=60, what="the second attempt")
    for process in mine:
        kill(process, signal.SIGCONT)
    eventually(lambda: not engines(shop.workshop, job, 1), what="the first engine is gone")
    gate.touch()
    shop.becomes(job, JobStatus.SUCCEEDED)
    assert [attempt.end for attempt in shop.workshop.attempts(job)] == [AttemptEnd.LOST, AttemptEnd.SUCCEEDED]
    assert {c.attempt for c in shop.workshop.checkpoints(job) if c.step > 5} == {2}


# --- Workers that are known -------------------------------------------------------------------------------


def known(workshop: Workshop) -> list[str]:
    with workshop.database.transaction(write=False) as session:
        return [worker.name for worker in list_workers(session, limit=10).rows]


def test_a_worker_is_known_as_long_as_it_lives(shop: Shop) -> None:
    worker = shop.worker()
    (name,) = eventually(lambda: known(shop.workshop), within=60, what="the worker's row")
    assert name.endswith(f"-{worker.pid}")
    kill(worker.pid, signal.SIGTERM)
    assert worker.ends() == 0
    assert known(shop.workshop) == []


def test_a_worker_that_is_to_release_its_job_gives_it_to_another(shop: Shop, gate: Path) -> None:
    job = shop.workshop.submit()
    shop.scheduler()
    shop.worker()
    shop.reaches(job, 5)
    (first,) = known(shop.workshop)
    with shop.workshop.database.transaction(write=True) as session:
        drain(session, first, "release")
    shop.becomes(job, JobStatus.QUEUED)
    gate.touch()
    shop.worker()
    shop.becomes(job, JobStatus.SUCCEEDED)
    attempts = shop.workshop.attempts(job)
    assert [attempt.end for attempt in attempts] == [AttemptEnd.RELEASED, AttemptEnd.SUCCEEDED]
    assert attempts[0].worker == first != attempts[1].worker
    assert shop.workshop.job(job).attempts_spent == 1
