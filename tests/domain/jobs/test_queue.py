"""The queue: fair share, positions, reasons of waiting, and the estimated start."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from domain.db import Database, db_now
from domain.jobs.fleet import live_fleet, memory_by_device_kind
from domain.jobs.leases import Claim, claim_next, expire_waiting, settle
from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, queue_position
from domain.jobs.states import AttemptOutcome, JobStatus
from domain.workers.models import Device, Worker
from domain.workers.repository import delete_stale_workers, drain, register_worker, worker_health
from tests.support.rows import add_job

CPU = Device("cpu", "CPU", 8 << 30)
GPU = Device("cuda", "NVIDIA L4", 24 << 30)


def position_of(session: Session, job: Job) -> QueuePosition:
    position = queue_position(session, job, worker_seconds=60)
    assert position is not None
    return position


def minute_after(moment: datetime) -> datetime:
    whole = moment.replace(second=0, microsecond=0)
    return whole if whole == moment else whole + timedelta(minutes=1)


def claim(session: Session, worker: str = "w1") -> Claim | None:
    return claim_next(session, worker=worker, lease_seconds=60)


def claim_all(session: Session) -> list[str]:
    return [each.job_id for each in iter(lambda: claim(session), None)]


def test_projects_get_their_fair_share_however_many_jobs_one_submits(database: Database) -> None:
    with database.transaction(write=True) as session:
        for number in range(4):
            add_job(session, id=f"job_greedy{number}", project="greedy")
        add_job(session, id="job_modest", project="modest")
        assert claim_all(session)[:2] == ["job_greedy0", "job_modest"]


def test_priority_outranks_fair_share(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session, id="job_one", project="a", priority=5)
        add_job(session, id="job_two", project="a", priority=5)
        add_job(session, id="job_other", project="b")
        assert claim_all(session) == ["job_one", "job_two", "job_other"]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), min_size=1, max_size=8))
def test_positions_are_the_order_of_the_claims(database: Database, jobs: Sequence[tuple[str, int]]) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.delete(Job))
        jobs_added = [add_job(session, project=project, priority=priority) for project, priority in jobs]
        positions = {job.id: position_of(session, job).position for job in jobs_added}
        assert sorted(positions.values()) == list(range(1, len(jobs_added) + 1))
        order = claim_all(session)
    assert [positions[job] for job in order] == sorted(positions.values())


def test_a_job_waits_for_a_worker_with_enough_memory(database: Database) -> None:
    with database.transaction(write=True) as session:
        job = add_job(session, memory_bytes=9 << 30)
        small, large = memory_by_device_kind([{"kind": "cpu", "memory_bytes": 8 << 30}]), {"cpu": 16 << 30}
        assert claim_next(session, worker="small", lease_seconds=60, memory=small) is None
        register_worker(session, "small", [CPU])
        assert position_of(session, job).reason == "no_worker_fits"
        claimed = claim_next(session, worker="large", lease_seconds=60, memory=large)
    assert claimed is not None


def test_a_job_for_any_device_gets_the_gpu_of_a_worker_that_has_one(database: Database) -> None:
    memory = memory_by_device_kind(
        [{"kind": "cuda", "memory_bytes": 4}, {"kind": "cuda", "memory_bytes": 2}, {"kind": "cpu", "memory_bytes": 9}]
    )
    assert memory == {"cuda": 2, "cpu": 9}
    with database.transaction(write=True) as session:
        add_job(session, id="job_any", memory_bytes=5)
        add_job(session, id="job_cpu", memory_bytes=5, device="cpu")
        claimed = claim_next(session, worker="w", lease_seconds=60, memory=memory)
    assert claimed is not None
    assert claimed.job_id == "job_cpu"


def test_the_queue_reason_names_what_is_missing(database: Database) -> None:
    with database.transaction(write=True) as session:
        first, second = add_job(session, device="cuda"), add_job(session, device="cuda")
        assert position_of(session, first).reason == "no_worker"
        register_worker(session, "w1", [CPU])
        assert position_of(session, first).reason == "no_worker_fits"
        register_worker(session, "w1", [CPU, GPU])
        assert (position_of(session, first).reason, position_of(session, second).reason) == (
            "waiting_for_worker",
            "jobs_ahead",
        )
        drain(session, "w1", "finish")
        assert position_of(session, first).reason == "no_worker"


def test_the_estimated_start_is_when_a_worker_comes_free(database: Database) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "w1", [CPU])
        now = session.scalars(sa.select(db_now())).one()
        running, first, second = (add_job(session) for _ in range(3))
        assert timedelta() <= (position_of(session, running).starts_at or now) - now < timedelta(minutes=2)
        claim(session)
        # No job has ended yet, so that no duration is known.
        assert position_of(session, first).starts_at is None
        session.execute(sa.update(Job).where(Job.id == running.id).values(eta_seconds=600.0, progress_at=now))
        assert position_of(session, first).starts_at == minute_after(now + timedelta(seconds=600))
        assert position_of(session, second).starts_at is None
        hour = timedelta(hours=1)
        add_job(session, status=JobStatus.SUCCEEDED, started_at=now - hour, finished_at=now)
        assert position_of(session, second).starts_at == minute_after(now + timedelta(seconds=600) + hour)


def test_a_job_that_exceeds_max_wait_fails(database: Database) -> None:
    with database.transaction(write=True) as session:
        late = add_job(session, waits_until=session.scalars(sa.select(db_now(-1))).one())
        add_job(session, waits_until=session.scalars(sa.select(db_now(60))).one())
        add_job(session)
        assert expire_waiting(session) == [late.id]
    with database.transaction(write=False) as session:
        row = session.get_one(Job, late.id)
    assert (row.status, (row.end_reason or {})["code"]) == (JobStatus.FAILED, "max_wait_exceeded")


def test_max_wait_ends_with_the_first_attempt(database: Database) -> None:
    with database.transaction(write=True) as session:
        add_job(session, waits_until=session.scalars(sa.select(db_now(60))).one())
        held = claim(session)
        assert held is not None
        settle(session, held, AttemptOutcome.released())
        session.execute(sa.update(Job).values(waits_until=db_now(-1)))
        assert expire_waiting(session) == []


# --- Workers ----------------------------------------------------------------------------------------------


def is_drained(session: Session) -> bool:
    return worker_health(session, "w1", max_wait_seconds=0).drained


def test_a_drained_worker_accepts_no_jobs_until_the_drain_ends(database: Database) -> None:
    with database.transaction(write=True) as session:
        assert not is_drained(session)
        register_worker(session, "w1", [CPU])
        drain(session, "w1", "finish")
        # The next heartbeat does not end the drain.
        register_worker(session, "w1", [CPU])
        assert is_drained(session)
        drain(session, "w1", None)
        assert not is_drained(session)


def test_workers_without_heartbeat_are_not_live_and_are_deleted_once_stale(database: Database) -> None:
    with database.transaction(write=True) as session:
        for name, age in (("alive", 0), ("silent", 120), ("gone", 100_000)):
            register_worker(session, name, [CPU])
            session.execute(sa.update(Worker).where(Worker.name == name).values(seen_at=db_now(-age)))
        assert [worker.name for worker in live_fleet(session, 60).workers] == ["alive"]
        assert delete_stale_workers(session) == 1
        assert sorted(session.scalars(sa.select(Worker.name))) == ["alive", "silent"]
