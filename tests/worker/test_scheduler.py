"""The scheduler: rings for queued jobs, reaps expired leases, collects garbage."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import sqlalchemy as sa

from domain.artifacts import ArtifactStore
from domain.db import db_now
from domain.idempotency.repository import KeyHolder, claim
from domain.jobs import leases
from domain.jobs.models import Job
from domain.jobs.queue import queue_position
from domain.jobs.repository import get_job
from domain.jobs.states import JobStatus
from domain.workers.models import Device
from domain.workers.repository import drain, quarantine, register_worker, wake_up_state
from tests.support.harness import PROJECT, ServiceHarness
from worker.app import celery_app
from worker.doorbell import BrokerUnreachable, Doorbell
from worker.scheduler import Scheduler


def scheduler(harness: ServiceHarness, redis_url: str) -> Scheduler:
    doorbell = Doorbell(celery_app(redis_url, "test"))
    return Scheduler(harness.database, harness.store, doorbell, harness.settings, harness.options())


def stop_after(rounds: int) -> Callable[[float], bool]:
    remaining = iter(range(rounds))
    return lambda _: next(remaining, None) is None


def test_scheduler_rings_once_for_each_queued_job(harness: ServiceHarness, redis_url: str) -> None:
    for _ in range(3):
        harness.submit()
    assert [scheduler(harness, redis_url).ring() for _ in range(2)] == [3, 0]


def test_scheduler_rings_for_jobs_that_may_be_claimed_and_for_checks_that_are_due(
    harness: ServiceHarness, redis_url: str
) -> None:
    jobs = [harness.submit() for _ in range(2)]
    with harness.database.transaction(write=True) as session:
        session.execute(sa.update(Job).where(Job.id == jobs[0]).values(not_before=db_now(60)))
        register_worker(session, "sick", [])
        quarantine(session, "sick", "The GPU is lost.", wait=lambda _: 60)
    assert scheduler(harness, redis_url).ring() == 1
    with harness.database.transaction(write=True) as session:
        drain(session, "sick", None)
    assert scheduler(harness, redis_url).ring() == 1


def test_job_of_a_lost_worker_is_requeued(harness: ServiceHarness, redis_url: str) -> None:
    job = harness.submit()
    with harness.database.transaction(write=True) as session:
        leases.claim_next(session, worker="lost", lease_seconds=60)
        session.execute(sa.update(Job).values(lease_expires_at=db_now(-1)))
    reaper = scheduler(harness, redis_url).reaper
    # One that just began does not know whether a heartbeat could arrive: it grants one more lease.
    assert reaper.look() == []
    with harness.database.transaction(write=True) as session:
        session.execute(sa.update(Job).values(lease_expires_at=db_now(-1)))
    assert reaper.look() == [job]
    assert harness.status_history(job)[-2:] == ["recovering", "queued"]
    assert reaper.look() == []


def test_leased_job_is_not_reaped(harness: ServiceHarness, redis_url: str) -> None:
    job = harness.submit()
    with harness.database.transaction(write=True) as session:
        leases.claim_next(session, worker="alive", lease_seconds=60)
    reaper = scheduler(harness, redis_url).reaper
    assert [reaper.look() for _ in range(2)] == [[], []]
    assert harness.job(job).status is JobStatus.PREPARING


def test_files_of_deleted_jobs_are_removed_and_others_stay(
    harness: ServiceHarness, redis_url: str, tmp_path: Path
) -> None:
    job = harness.submit()
    (tmp_path / "file").write_text("x")
    for owner in (job, "job_gone"):
        harness.store.publish_file(tmp_path / "file", f"jobs/{owner}/attempt-1/result.json")
    scratch = harness.settings.artifact_root / ".staging" / "half"
    scratch.mkdir()
    os.utime(scratch, (0, 0))
    assert scheduler(harness, redis_url).collect_garbage() == 2
    assert harness.store.list_keys("jobs") == [f"jobs/{job}"]


def test_dataset_file_without_a_row_is_removed(harness: ServiceHarness, redis_url: str, tmp_path: Path) -> None:
    harness.submit()
    known = harness.store.list_keys("datasets")
    (tmp_path / "file").write_text("x")
    for name, age in (("ds_old", 7200), ("ds_new", 60)):
        harness.store.publish_file(tmp_path / "file", f"datasets/{name}.jsonl")
        modified_at = time.time() - age
        os.utime(harness.settings.artifact_root / f"datasets/{name}.jsonl", (modified_at, modified_at))
    os.utime(harness.settings.artifact_root / known[0], (0, 0))
    # The new file may be an upload whose transaction has not been committed yet.
    assert scheduler(harness, redis_url).collect_garbage() == 1
    assert harness.store.list_keys("datasets") == sorted([*known, "datasets/ds_new.jsonl"])


def test_empty_database_does_not_empty_the_store(harness: ServiceHarness, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    harness.store.publish_file(tmp_path / "file", "jobs/job_of_another_database/attempt-1/result.json")
    assert scheduler(harness, redis_url).collect_garbage() == 0
    assert harness.store.list_keys("jobs") == ["jobs/job_of_another_database"]


def test_expired_idempotency_keys_are_removed(harness: ServiceHarness, redis_url: str) -> None:
    with harness.database.transaction(write=True) as session:
        for key, seconds in (("old", 0), ("new", 60)):
            claim(session.connection(), KeyHolder("default", key, "token"), fingerprint=None, seconds=seconds)
    assert [scheduler(harness, redis_url).collect_garbage() for _ in range(2)] == [1, 0]


class UnreachableDoorbell:
    def ring_for(self, queued: int, *, limit: int) -> int:
        raise BrokerUnreachable(f"{queued} of {limit}")

    def waiting(self) -> int:
        raise BrokerUnreachable


def test_unreachable_broker_does_not_stop_the_other_duties(harness: ServiceHarness, redis_url: str) -> None:
    job = harness.submit()
    with harness.database.transaction(write=True) as session:
        leases.claim_next(session, worker="lost", lease_seconds=60)
        session.execute(sa.update(Job).values(lease_expires_at=db_now(-1)))
    without_broker = replace(scheduler(harness, redis_url), doorbell=cast(Doorbell, UnreachableDoorbell()))
    without_broker.reaper.look()
    with harness.database.transaction(write=True) as session:
        session.execute(sa.update(Job).values(lease_expires_at=db_now(-1)))
    without_broker.run(stop_after(2))
    assert harness.job(job).status is JobStatus.QUEUED


class SlowStore(ArtifactStore):
    """Takes long to remove files: until it is told to go on, or for ten seconds."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_go_on = threading.Event()
        self.waited_for_nothing = False

    def remove_stale(self, older_than: float) -> int:
        self.waited_for_nothing = not self.may_go_on.wait(10)
        return super().remove_stale(older_than)


def test_no_job_waits_for_files_that_are_removed(harness: ServiceHarness, redis_url: str) -> None:
    store = SlowStore(harness.settings.artifact_root)
    subject = replace(scheduler(harness, redis_url), store=store)
    harness.submit()

    def end_when_rung(_seconds: float) -> bool:
        # The loop has come here while files are removed.
        store.may_go_on.set()
        return subject.doorbell.waiting() == 1

    subject.run(end_when_rung)
    assert not store.waited_for_nothing


def test_each_duty_runs_when_it_is_due(harness: ServiceHarness, redis_url: str) -> None:
    harness.submit()
    times = iter(float(n) for n in range(1000))
    subject = scheduler(harness, redis_url)
    subject.run(stop_after(3), clock=lambda: next(times))
    assert subject.doorbell.waiting() == 1


def test_unreachable_broker_is_why_jobs_wait(harness: ServiceHarness, redis_url: str, tmp_path: Path) -> None:
    job = harness.submit()

    def report(url: str) -> tuple[str, str]:
        scheduler(harness, url).report()
        with harness.database.transaction(write=True) as session:
            register_worker(session, "idle", [Device("cpu", "CPU", None)])
            position = queue_position(session, get_job(session, PROJECT, job), worker_seconds=60)
            assert position is not None
            return wake_up_state(session, 60), position.reason

    with harness.database.transaction(write=False) as session:
        assert wake_up_state(session, 60) == "no_scheduler"
    assert report(f"unix://{tmp_path}/none.sock") == ("broker_unreachable", "broker_unreachable")
    assert report(redis_url) == ("ok", "waiting_for_worker")
